"""Configurations of other trainers become ones that load here, and each of their keys is told."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from helpers.imported_configurations import CASES, FILES
from post_training.config.load import load_config
from post_training.core import yaml
from post_training.core.errors import ConfigError, UsageError
from post_training.importers.documents import compose, read_with_references
from post_training.importers.run import SYSTEMS, Request, import_settings
from post_training.importers.translation import flatten
from post_training.stages.registry import find_stage


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with all files."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def setting(settings: dict, path: str) -> object:
    for part in path.split("."):
        settings = settings[part]
    return settings


def test_every_system_has_a_case():
    assert {case.system for case in CASES.values()} == set(SYSTEMS)


def test_import_command_writes_a_file_that_loads(folder: Path, post_training: Callable):
    words = ["swissai", *CASES["swissai"].files, "--set", "training.max_steps=5"]
    words += ["--set", "training.num_train_epochs=null", "--drop", "wandb", "--out", "ours.yaml"]
    done = post_training("import", *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.endswith("ours.yaml: for `entrypoint sft ours.yaml`\n")
    assert "trainer: 'ln-plw' -> loss.name: 'ln-plw'\n" in done.stderr
    loaded = load_config(find_stage("sft").load_config_class(), folder / "ours.yaml")
    assert loaded.training.max_steps == 5


@pytest.mark.parametrize("name", CASES)
def test_import_loads_and_tells_of_each_key(name: str, folder: Path):
    request = CASES[name]
    imported = import_settings(request)
    (folder / "ours.yaml").write_text(yaml.dump(imported.settings))
    load_config(find_stage(imported.stage).load_config_class(), folder / "ours.yaml")
    # Whatever the files say, at any depth, has a line.
    keys = keys_of(request) - set(request.drop)
    assert sorted(key for key in keys if not any(told(key, line) for line in imported.lines)) == []


def keys_of(request: Request) -> set[str]:
    module = import_module(f"post_training.importers.{request.system}")
    words = list(request.files)
    if request.system == "swissai":
        data, _ = compose(Path(words[0]), words[1:])
    else:
        data, _ = read_with_references([Path(words[0])], words[1:])
    keys = {key for key, _ in flatten(data, module.WHOLE)}
    return {key.replace("-", "_") for key in keys} if request.system == "neox" else keys


def told(key: str, line: str) -> bool:
    return line.startswith((f"{key}:", f"{key} "))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "axolotl",
            {
                "stage": "sft",
                "training.effective_batch_size": 64,  # 8 × 2 × 4
                "training.optimizer": "adamw",
                "training.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
                "training.pad_to_multiple_of": 2048,
                "checkpointing.saves_per_epoch": 2,
                "distributed.strategy": "zero3",
                "distributed.offload": "optimizer",
                "model.attn_implementation": "varlen",
                "data.chat_template": "model",
            },
        ),
        (
            "axolotl-dpo",
            {
                "stage": "dpo",
                "loss": {"name": "dpo", "beta": 0.1},
                "lora": {"rank": 32, "alpha": 16, "dropout": 0.05},
                "training.effective_batch_size": 32,
            },
        ),
        (
            "openeurollm",
            {
                "stage": "sft",
                "training.max_steps": 20,
                "training.effective_batch_size": 32,
                "training.warmup": 0.03,
                "distributed.strategy": "zero2",
                "sft.packing": "bfd",
                "output_base": "outputs",
                "logging.report_to": [],
            },
        ),
        ("openeurollm-dpo", {"stage": "dpo", "loss.name": "dpo", "loss.beta": 5.0}),
        (
            "swissai",
            {
                "stage": "sft",
                "loss.name": "ln-plw",
                "training.effective_batch_size": 32,
                "distributed.strategy": "zero1",
                "output_base": "artifacts/private/outputs/train_sft/try",
                "data.chat_template": "tulu",
                "sft.packing": "none",
                "seed": 42,
            },
        ),
        (
            "swissai-preference",
            {
                "stage": "dpo",
                "loss.name": "qrpo",
                "dpo.num_ref_rewards": 10,
                "distributed.strategy": "zero3",
                "distributed.offload": "optimizer",
            },
        ),
        (
            "neox",
            {
                "stage": "sft",
                "data.indexed": ["sft_text_document"],
                "sft.packing": "k_bin_packed",
                "training.effective_batch_size": 64,
                "training.exit_interval": 500,
                "training.optimizer_args": {"betas": [0.9, 0.95], "eps": 1e-8},
                "training.lr_scheduler_kwargs": {"min_lr": 1e-6},
            },
        ),
        (
            "llamafactory",
            {"stage": "sft", "data.train_on": "last_turn", "sft.max_seq_length": 16384},
        ),
        # A key of the file counts, and never the default of another name of it.
        (
            "open-instruct",
            {"stage": "sft", "sft.max_seq_length": 4096, "training.learning_rate": 5e-6},
        ),
        (
            "trl",
            {
                "stage": "sft",
                "lora": {"rank": 32, "alpha": 16, "dropout": 0.05},
                "training.num_train_epochs": 1,
            },
        ),
    ],
)
def test_import_gives_the_settings_that_are_meant(name: str, expected: dict, folder: Path):
    imported = import_settings(CASES[name])
    found = {"stage": imported.stage} | {
        path: setting(imported.settings, path) for path in expected if path != "stage"
    }
    assert found == expected


def test_import_of_another_weight_is_the_share_of_rows(folder: Path):
    imported = import_settings(CASES["openeurollm-dpo"])
    assert imported.settings["data"]["datasets"] == [
        {"path": "pairs.jsonl", "subsample_factor": 0.5, "name": "pairs"}
    ]


def test_import_key_without_a_counterpart_is_refused_unless_dropped(folder: Path):
    with open("axolotl.yaml", "a") as file:
        file.write("flash_attn_fuse_mlp: true\nneftune_noise_alpha: 5\nlaerning_rate: 1\n")
    request = Request("axolotl", ["axolotl.yaml"], num_processes=1)
    with pytest.raises(ConfigError) as error:
        import_settings(request)
    first, second, third = error.value.faults
    assert first.startswith("axolotl.yaml:58: flash_attn_fuse_mlp: true: no counterpart: matrices ")
    assert first.endswith("; --drop flash_attn_fuse_mlp leaves it out")
    assert second.startswith("axolotl.yaml:59: neftune_noise_alpha: 5: no counterpart: ")
    assert "laerning_rate: 1: is not known here, did you mean 'learning_rate'?" in third
    dropped = ["flash_attn_fuse_mlp", "neftune_noise_alpha", "laerning_rate"]
    imported = import_settings(Request("axolotl", request.files, dropped, num_processes=1))
    assert imported.lines[:3] == [f"{key}: dropped" for key in dropped]


def test_import_without_the_number_of_processes_asks_for_it(folder: Path):
    with pytest.raises(ConfigError, match="give --num-processes"):
        import_settings(Request("axolotl", ["axolotl.yaml"]))


def test_import_model_of_the_hub_says_what_to_fetch(folder: Path):
    text = Path("axolotl.yaml").read_text().replace("base_model: model", "base_model: org/name")
    Path("axolotl.yaml").write_text(text)
    request = Request("axolotl", ["axolotl.yaml"], num_processes=1)
    with pytest.raises(ConfigError, match="set revision, hub_dir too") as error:
        import_settings(request)
    assert "post-training model fetch org/name --hub-dir DIR" in error.value.hint
    named = [f"model.revision={'a' * 40}", "model.hub_dir=hub"]
    imported = import_settings(Request("axolotl", request.files, (), named, num_processes=1))
    assert imported.settings["model"]["hub"] == "org/name"


@pytest.mark.parametrize(
    ("system", "files", "problem"),
    [
        ("verl", ["axolotl.yaml"], "no importer for 'verl'"),
        ("axolotl", [], "name at least one file"),
        ("axolotl", ["nowhere.yaml"], "nowhere.yaml: no such file"),
        ("swissai", ["swissai"], "name the main file in it"),
        (
            "swissai",
            ["swissai/train-sft.yaml", "model=gpt"],
            "model=gpt: no such file: swissai/model",
        ),
        ("swissai", ["swissai/train-sft.yaml", "tulu"], "must be key=value or group=name"),
    ],
)
def test_import_of_what_cannot_be_read_is_refused(
    system: str, files: list[str], problem: str, folder: Path
):
    with pytest.raises(UsageError) as error:
        import_settings(Request(system, files))
    assert problem in str(error.value)


def test_import_reference_without_an_end_is_refused(folder: Path):
    Path("circle.yaml").write_text("a: ${b}\nb: ${a}\n")
    with pytest.raises(UsageError, match="refers to itself"):
        import_settings(Request("openeurollm", ["circle.yaml"]))
    Path("circle.yaml").write_text("a: ${nothing}\n")
    with pytest.raises(UsageError, match="there is no such key"):
        import_settings(Request("openeurollm", ["circle.yaml"]))


def test_import_writes_over_no_file(folder: Path, post_training: Callable):
    Path("ours.yaml").write_text("mine")
    done = post_training("import", "neox", "neox.yml", "--out", "ours.yaml", cwd=folder)
    assert done.returncode == 2
    assert "error: ours.yaml: is there already" in done.stderr
    assert Path("ours.yaml").read_text() == "mine"


def test_import_deepspeed_with_fp16_or_nvme_is_refused(folder: Path):
    given = json.loads(Path("deepspeed.json").read_text())
    for change, problem in (
        ({"fp16": {"enabled": True}}, "fp16 has no counterpart"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3"),
    ):
        Path("deepspeed.json").write_text(json.dumps(given | change))
        with pytest.raises(ConfigError, match=problem):
            import_settings(CASES["axolotl"])


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, and by the other"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, and by the other settings"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer and scheduler are named in training"),
        ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu is 7, and by"),
        ({"gradient_accumulation_steps": 7}, "is not training.effective_batch_size"),
    ],
)
def test_import_deepspeed_that_says_otherwise_than_the_trainer_is_refused(
    part: dict, problem: str, folder: Path
):
    given = json.loads(Path("deepspeed.json").read_text())
    Path("deepspeed.json").write_text(json.dumps(given | part))
    with pytest.raises(ConfigError, match=problem) as error:
        import_settings(CASES["axolotl"])
    assert error.value.faults[0].startswith("deepspeed.json: ")
    # What both say the same is no part of the result.
    same = {"gradient_accumulation_steps": 2, "train_batch_size": 64, "steps_per_print": 10}
    Path("deepspeed.json").write_text(json.dumps(given | same))
    settings = import_settings(CASES["axolotl"]).settings
    assert not settings["distributed"]["deepspeed_config"].keys() & (same.keys() | part.keys())


def test_import_of_open_instruct_has_its_own_defaults(folder: Path):
    lines = Path("open-instruct.yaml").read_text().splitlines()
    left_out = ("num_train_epochs", "warmup_ratio", "weight_decay", "max_seq_length")
    lines = [line for line in lines if not line.startswith(left_out)]
    Path("open-instruct.yaml").write_text("\n".join([*lines, "use_lora: true", ""]))
    request = Request("trl", ["open-instruct.yaml"], num_processes=2)
    with pytest.raises(ConfigError, match=r"sft\.max_seq_length: missing"):
        import_settings(request)
    request = Request("trl", request.files, (), ["sft.max_seq_length=512"], num_processes=2)
    settings = import_settings(request).settings
    assert settings["lora"] == {"rank": 64, "alpha": 16, "dropout": 0.1}
    training = settings["training"]
    found = {key: training[key] for key in ("num_train_epochs", "warmup", "weight_decay")}
    assert found == {"num_train_epochs": 2, "warmup": 0.03, "weight_decay": 0.0}
    assert training["gradient_checkpointing"] is False
    words = [*request.files, "warmup_steps=10", "keep_last_n_checkpoints=-1", "clip_grad_norm=0.5"]
    request = Request("trl", words, (), request.overrides, num_processes=2)
    settings = import_settings(request).settings
    assert (settings["training"]["warmup"], settings["training"]["max_grad_norm"]) == (10, 0.5)
    assert settings["checkpointing"]["save_total_limit"] is None


def test_import_of_neox_with_an_iteration_offset_is_as_long_as_the_rest(folder: Path):
    request = CASES["neox"]
    words = [*request.files, "iteration_offset=400"]
    imported = import_settings(Request("neox", words, num_processes=8))
    assert setting(imported.settings, "training.iteration_offset") == 400
    assert setting(imported.settings, "training.max_steps") == 600
    words[-1] = "iteration_offset=null"
    untouched = import_settings(Request("neox", words, num_processes=8)).settings["training"]
    assert (untouched["max_steps"], "iteration_offset" in untouched) == (1000, False)
    words[-1] = "iteration_offset=1000"
    with pytest.raises(ConfigError, match="train_iters: 1000: must be > iteration_offset, 1000"):
        import_settings(Request("neox", words, num_processes=8))


PAIR = {"chosen": "chosen", "rejected": "rejected"}
SHARES = {"messages": "conversations", **PAIR}


@pytest.mark.parametrize(
    ("of_file", "expected"),
    [
        ({}, {"format": "preference", "columns": {"prompt": "instruction", **PAIR}}),
        (
            {"columns": {"prompt": "question", "query": "context", **PAIR}},
            {
                "format": "preference",
                "columns": {"prompt": "question", "input": "context", **PAIR},
            },
        ),
        ({"formatting": "sharegpt", "columns": SHARES}, {"transform": "sharegpt_preference"}),
    ],
)
def test_import_of_llamafactorys_ranking_reads_the_columns_of_its_pairs(
    of_file: dict, expected: dict, folder: Path
):
    known = {"long_sft": {"file_name": "pairs.jsonl", "ranking": True, **of_file}}
    Path("llamafactory/data/dataset_info.json").write_text(json.dumps(known))
    words = [*CASES["llamafactory"].files, "stage=dpo", "dataset=long_sft"]
    imported = import_settings(
        Request(
            "llamafactory",
            words,
            drop=["cutoff_len"],
            overrides=["dpo.max_prompt_length=1024", "dpo.max_completion_length=1024"],
            num_processes=1,
        )
    )
    [dataset] = imported.settings["data"]["datasets"]
    path = "llamafactory/data/pairs.jsonl"
    assert dataset == {"name": "long_sft", "path": path, **expected}


def test_import_of_llamafactorys_ranking_with_columns_that_nothing_reads_is_refused(folder: Path):
    columns = {**SHARES, "messages": "chat"}
    known = {"file_name": "pairs.jsonl", "ranking": True, "formatting": "sharegpt"}
    Path("llamafactory/data/dataset_info.json").write_text(
        json.dumps({"long_sft": {**known, "columns": columns}})
    )
    with pytest.raises(ConfigError, match="transform: sharegpt_preference` reads conversations"):
        import_settings(
            Request("llamafactory", ["llamafactory/sft.yaml", "dataset=long_sft"], num_processes=1)
        )


@pytest.mark.parametrize(
    ("name", "left_out", "expected"),
    [
        ("axolotl", ["warmup_ratio"], {"training.warmup": 0.03}),
        (
            "neox",
            ["warmup", "weight-decay"],
            {"training.warmup": 0.01, "training.weight_decay": 0.1},
        ),
        (
            "llamafactory",
            ["finetuning_type"],
            {"lora.rank": 8, "lora.alpha": 16},
        ),
    ],
)
def test_import_of_what_a_file_leaves_out_is_what_they_do(
    name: str, left_out: list[str], expected: dict, folder: Path
):
    path = Path(CASES[name].files[0])
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.strip(' "').split(":")[0].strip('"') not in left_out]
    path.write_text("".join(kept))
    imported = import_settings(CASES[name])
    assert {key: setting(imported.settings, key) for key in expected} == expected
    assert all(any(key in line for line in imported.lines) for key in expected)


def test_import_axolotl_warmup_that_is_left_out_is_at_most_100_steps(folder: Path):
    text = Path("axolotl.yaml").read_text().replace("warmup_ratio: 0.0\n", "")
    for steps, warmup in ((20, 0), (50, 2), (1000, 30), (10_000, 100)):
        Path("axolotl.yaml").write_text(f"{text}max_steps: {steps}\n")
        assert setting(import_settings(CASES["axolotl"]).settings, "training.warmup") == warmup


def test_import_axolotl_keeps_both_of_wandb_and_tensorboard(folder: Path):
    path = Path("axolotl.yaml")
    kept = [line for line in path.read_text().splitlines() if not line.startswith("wandb_project")]
    path.write_text("\n".join([*kept, "wandb_project: ours", "use_tensorboard: true", ""]))
    imported = import_settings(CASES["axolotl"])
    assert setting(imported.settings, "logging.report_to") == ["wandb", "tensorboard"]


def test_import_open_instruct_clipping_that_is_null_is_its_default(folder: Path):
    path = Path("open-instruct.yaml")
    kept = [line for line in path.read_text().splitlines() if not line.startswith("clip_grad_norm")]
    path.write_text("\n".join([*kept, "clip_grad_norm: null", ""]))
    lines = import_settings(CASES["open-instruct"]).lines
    assert any("clip_grad_norm" in line and "clips at 1" in line for line in lines)


def test_import_llamafactory_columns_that_are_not_read_are_refused(folder: Path):
    path = Path("llamafactory/data/dataset_info.json")
    for given, problem in (
        ({"columns": {"prompt": "q", "response": "a", "history": "h"}}, "columns.history"),
        ({"formatting": "sharegpt", "columns": {"images": "images"}}, "columns.images"),
        ({"formatting": "sharegpt", "tags": {"other_tag": "x"}}, "tags.other_tag"),
    ):
        named = json.loads(path.read_text())
        named["instructions"] = {"file_name": "alpaca.json", **given}
        path.write_text(json.dumps(named))
        with pytest.raises(ConfigError, match=f"instructions: {problem}: no counterpart"):
            import_settings(CASES["llamafactory"])


def test_import_of_accelerates_file_keeps_its_precision_and_the_deepspeed_file_it_names(folder):
    path = Path("swissai/accelerate/ds-zero3.yaml")
    words = ["swissai/train-sft.yaml", "model=apertus-8b", f"accelerate_config={path}"]
    request = Request("swissai", words, num_processes=4)
    given = {"distributed_type": "DEEPSPEED", "mixed_precision": "bf16"}
    ours = {"zero_stage": 1, "gradient_clipping": 0.5}
    path.write_text(json.dumps({**given, "deepspeed_config": ours}))
    with pytest.raises(ConfigError, match=r"gradient_clipping is 0\.5, and by the other"):
        import_settings(request)
    meant = Request("swissai", words, overrides=["training.max_grad_norm=0.5"], num_processes=4)
    imported = import_settings(meant)
    assert setting(imported.settings, "training.mixed_precision") == "bf16"
    assert any("deepspeed_config.gradient_clipping: 0.5: compared" in s for s in imported.lines)
    path.write_text(
        json.dumps({**given, "deepspeed_config": {"deepspeed_config_file": "deepspeed.json"}})
    )
    assert setting(import_settings(request).settings, "distributed.strategy") == "zero3"
    path.write_text(json.dumps({**given, "mixed_precision": "fp16", "deepspeed_config": ours}))
    with pytest.raises(ConfigError, match="only bf16 or no"):
        import_settings(request)


def test_import_of_a_part_of_a_split_is_that_part(folder: Path):
    words = [*CASES["swissai"].files, "training_args.eval_strategy=steps"]
    words += ["training_args.eval_steps=5", "dataset_args.eval_split.name=test"]
    imported = import_settings(Request("swissai", [*words, "dataset_args.eval_split.end=9"]))
    [rows] = imported.settings["evaluation"]["datasets"]
    assert (rows["split"], rows["max_rows"]) == ("test", 9)
    with pytest.raises(ConfigError, match=r"eval_split\.start"):
        import_settings(Request("swissai", [*words, "dataset_args.eval_split.start=9"]))
