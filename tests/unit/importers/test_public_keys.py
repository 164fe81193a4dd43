"""Keys that stand in the public examples of the other systems, and what becomes of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from post_training.core import yaml
from post_training.core.errors import ConfigError, UsageError
from post_training.importers.run import Imported, Request, import_settings

AXOLOTL = {
    "base_model": "model",
    "datasets": [{"path": "chats.jsonl", "type": "chat_template"}],
    "output_dir": "out",
    "learning_rate": 2e-5,
}
AXOLOTL_DPO = {
    **AXOLOTL,
    "rl": "dpo",
    "datasets": [{"path": "pairs.jsonl", "type": "chat_template.default"}],
    "sample_packing": False,
    "pad_to_sequence_len": True,
}
TRL = {
    "model_name_or_path": "model",
    "dataset_name": "pairs.jsonl",
    "output_dir": "out",
    "learning_rate": 5e-7,
}
OPEN_INSTRUCT = {
    "model_name_or_path": "model",
    "dataset_mixer": {"rows.jsonl": 1.0},
    "max_seq_length": 2048,
}
OPEN_INSTRUCT_DPO = {
    "model_name_or_path": "model",
    "dataset_mixer": {"pairs.jsonl": 1.0},
    "num_epochs": 1,
}
LLAMAFACTORY = {
    "model_name_or_path": "model",
    "stage": "sft",
    "finetuning_type": "full",
    "dataset": "long_sft",
    "dataset_dir": "data",
    "template": "chatml",
    "output_dir": "out",
}
NEOX = {
    "data-path": "rows_text_document",
    "load": "model",
    "save": "out",
    "seq-length": 2048,
    "train-iters": 10,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-5}},
}
OPENEUROLLM = {
    "model": {"name_or_path": "model"},
    "training": {"max_steps": 10, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    "data": {"chat_template": "olmo3-instruct-sft", "datasets": [{"path": "rows.jsonl"}]},
}
PAIR = {"chosen": "chosen", "rejected": "rejected"}

Importing = Callable[..., Imported]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Importing:
    """Import a mapping as the file of a system: imported("axolotl", {…}, drop=[…])."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text('{"long_sft": {"file_name": "rows.json"}}')

    def run(system: str, given: dict[str, Any], *words: str, **others: Any) -> Imported:
        Path("theirs.yaml").write_text(yaml.dump(given))
        return import_settings(Request(system, ["theirs.yaml", *words], num_processes=1, **others))

    return run


def setting(imported: Imported, path: str) -> Any:
    value: Any = imported.settings
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value[part]
    return value


@pytest.mark.parametrize(
    ("system", "base", "given", "path", "expected"),
    [
        ("axolotl", AXOLOTL, {}, "sft.overlong", "drop"),
        ("axolotl", AXOLOTL, {"excess_length_strategy": "raise"}, "sft.overlong", "fail"),
        ("axolotl", AXOLOTL, {}, "training.mixed_precision", "bf16"),
        ("axolotl", AXOLOTL, {}, "checkpointing", {"saves_per_epoch": 1, "save_total_limit": 4}),
        ("axolotl", AXOLOTL, {"save_steps": 9}, "checkpointing.save_steps", 9),
        ("trl", TRL, {}, "checkpointing", {"save_total_limit": None}),
        ("trl", OPEN_INSTRUCT, {}, "checkpointing", {"save_total_limit": 3}),
        ("trl", OPEN_INSTRUCT_DPO, {}, "training.warmup", 0.1),
        ("llamafactory", LLAMAFACTORY, {}, "checkpointing", {"save_total_limit": None}),
        ("neox", NEOX, {}, "checkpointing", {"save_total_limit": None}),
        ("neox", NEOX, {}, "training.weight_decay", 0.1),
        ("axolotl", AXOLOTL, {"liger_rope": True}, "training.use_liger_kernel", True),
        ("axolotl", AXOLOTL, {"curriculum_sampling": True}, "training.shuffle", False),
        ("axolotl", AXOLOTL, {"optimizer": "paged_adamw_32bit"}, "training.optimizer", "adamw"),
        ("axolotl", AXOLOTL, {"use_wandb": True}, "logging.report_to", ["wandb"]),
        (
            "axolotl",
            AXOLOTL,
            {"sample_packing": True, "sample_packing_sequentially": True},
            "sft.packing",
            "next_fit",
        ),
        (
            "axolotl",
            AXOLOTL,
            {"attn_implementation": "kernels-community/vllm-flash-attn3"},
            "model.attn_implementation",
            "varlen",
        ),
        (
            "axolotl",
            AXOLOTL,
            {"flex_attention": True},
            "model.attn_implementation",
            "flex_attention",
        ),
        ("axolotl", AXOLOTL, {"batch_flattening": True}, "training.padding_free", True),
        ("axolotl", AXOLOTL_DPO, {"dpo_loss_type": ["hinge"]}, "loss.name", "hinge"),
        ("axolotl", AXOLOTL_DPO, {"max_prompt_len": 99}, "dpo.max_prompt_length", 99),
        ("axolotl", AXOLOTL_DPO, {}, "loss", {"name": "dpo", "beta": 0.1}),
        ("axolotl", AXOLOTL_DPO, {"rl": "ipo", "rl_beta": 0.3}, "loss.name", "ipo"),
        ("trl", OPEN_INSTRUCT, {"packing": True}, "training.padding_free", True),
        ("trl", OPEN_INSTRUCT, {"zero_stage": 3}, "distributed.strategy", "zero3"),
        ("trl", OPEN_INSTRUCT, {"max_train_samples": 7}, "data.datasets.0.max_rows", 7),
        (
            "trl",
            TRL,
            {"lora_target_modules": ["q_proj"], "use_peft": True},
            "lora.target_modules",
            ["q_proj"],
        ),
        ("trl", TRL, {"loss_type": ["ipo"]}, "loss.name", "ipo"),
        ("trl", OPEN_INSTRUCT_DPO, {}, "loss", {"name": "dpo-norm", "beta": 5.0}),
        ("trl", OPEN_INSTRUCT_DPO, {"dpo_beta": 0.2}, "loss", {"name": "dpo", "beta": 0.2}),
        ("trl", OPEN_INSTRUCT_DPO, {}, "training.num_train_epochs", 1),
        ("llamafactory", LLAMAFACTORY, {"template": None}, "data.chat_template", "model"),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"template": "qwen3_nothink"},
            "data.chat_template",
            "chatml",
        ),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"disable_gradient_checkpointing": True},
            "training.gradient_checkpointing",
            False,
        ),
        ("llamafactory", LLAMAFACTORY, {"disable_shuffling": True}, "training.shuffle", False),
        ("llamafactory", LLAMAFACTORY, {"pure_bf16": True}, "training.mixed_precision", "bf16"),
        (
            "llamafactory",
            LLAMAFACTORY,
            {"eval_dataset": "long_sft"},
            "evaluation.datasets.0.path",
            "data/rows.json",
        ),
        ("neox", NEOX, {"warmup-iters": 50}, "training.warmup", 50),
    ],
)
def test_a_public_key_becomes_a_setting(
    system: str, base: dict, given: dict, path: str, expected: Any, imported: Importing
):
    assert setting(imported(system, base | given), path) == expected


@pytest.mark.parametrize(
    ("system", "base", "given"),
    [
        ("axolotl", AXOLOTL, {"tf32": True}),
        ("axolotl", AXOLOTL, {"trust_remote_code": True}),
        ("axolotl", AXOLOTL, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("axolotl", AXOLOTL, {"lora_mlp_kernel": True}),
        ("axolotl", AXOLOTL, {"loss_watchdog_threshold": 5.0}),
        ("axolotl", AXOLOTL, {"revision_of_model": "6299b5a"}),
        ("axolotl", AXOLOTL, {"trackio_run_name": None}),
        ("trl", TRL, {"truncation_mode": "keep_start"}),
        ("trl", TRL, {"eval_packing": True}),
        ("trl", OPEN_INSTRUCT, {"use_slow_tokenizer": True}),
        ("trl", OPEN_INSTRUCT, {"dataset_mix_dir": "output"}),
        ("trl", OPEN_INSTRUCT, {"model_revision": "main"}),
        ("trl", OPEN_INSTRUCT, {"save_only_model": True}),
        ("llamafactory", LLAMAFACTORY, {"use_reentrant_gc": False}),
        ("neox", NEOX, {"checkpoint_validation_with_forward_pass": False}),
        ("neox", NEOX, {"rope_fusion": True}),
        ("neox", NEOX, {"fp32_allreduce": True}),
        ("neox", NEOX, {"maximum_tokens": 102}),
    ],
)
def test_a_public_key_that_changes_nothing_here_is_told_and_not_refused(
    system: str, base: dict, given: dict, imported: Importing
):
    without = imported(system, base)
    found = imported(system, base | given)
    assert found.settings == without.settings
    [key] = given
    assert any(line.startswith(key) for line in found.lines)


@pytest.mark.parametrize(
    ("system", "base", "given", "problem"),
    [
        ("axolotl", AXOLOTL, {"rl": "kto"}, "rl: 'kto': no counterpart: dpo, ipo have"),
        ("axolotl", AXOLOTL, {"fp8": True}, "models are trained in 16 or 32 bits"),
        (
            "axolotl",
            AXOLOTL,
            {"qat": {"weight_dtype": "int4"}},
            "qat: {weight_dtype: 'int4'}: no c",
        ),
        ("axolotl", AXOLOTL, {"adapter": "qlora"}, "`adapter=lora` behind the file takes lora"),
        ("axolotl", AXOLOTL, {"eta_min": 1e-7}, "lr_scheduler_kwargs"),
        ("axolotl", AXOLOTL, {"chat_template_jinja": "{{ x }}"}, "write it into a file"),
        ("axolotl", AXOLOTL, {"tensor_parallel_size": 2}, "distributed.strategy divides"),
        ("axolotl", AXOLOTL, {"datasets": ["rows.jsonl"]}, "must be a mapping with a path"),
        ("trl", TRL, {"dataset_text_field": "body"}, "data.datasets[0].columns={text: body}"),
        ("trl", TRL, {"sync_ref_model": True}, "the reference stays as it is"),
        ("trl", OPEN_INSTRUCT, {"add_bos": True}, "{{ bos_token }}"),
        ("trl", OPEN_INSTRUCT, {"load_balancing_loss": True}, "router_aux_loss_coef"),
        ("llamafactory", LLAMAFACTORY, {"template": "default"}, "template: 'default': no counterp"),
        ("llamafactory", LLAMAFACTORY, {"use_muon": True}, "training.optimizer names those"),
        ("neox", NEOX, {"train_impl": "kto"}, "kto reads files that are none of ours"),
        ("neox", NEOX, {"train_label_data_paths": ["x"]}, "PREFIX_kinds_document"),
    ],
)
def test_a_public_key_without_a_counterpart_says_why(
    system: str, base: dict, given: dict, problem: str, imported: Importing
):
    with pytest.raises(ConfigError) as error:
        imported(system, base | given)
    assert problem in error.value.faults[0]


@pytest.mark.parametrize(
    ("kind", "others", "columns"),
    [
        (
            "chat_template.default",
            {"field_messages": "conversation"},
            {"prompt": "conversation", **PAIR},
        ),
        ("chat_template.argilla_chat", {}, PAIR),
        (
            "chatml.intel",
            {"field_chosen": "good"},
            {"prompt": "question", **PAIR, "chosen": "good"},
        ),
        ("llama3.ultra", {}, PAIR),
    ],
)
def test_axolotls_preferences_are_read_by_their_columns(
    kind: str, others: dict, columns: dict, imported: Importing
):
    datasets = [{"path": "pairs.jsonl", "type": kind, **others}]
    found = imported("axolotl", AXOLOTL_DPO | {"datasets": datasets})
    assert found.stage == "dpo"
    assert "sft" not in found.settings
    assert found.settings["data"]["datasets"] == [
        {"path": "pairs.jsonl", "columns": columns, "format": "preference"}
    ]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", {"split": "train"}),
        ("train[:1000]", {"split": "train", "max_rows": 1000}),
        ("train[:20%]", {"split": "train", "subsample_factor": 0.2}),
    ],
)
def test_a_part_of_a_split_is_that_part(split: str, expected: dict, imported: Importing):
    rows = [{"path": "rows", "type": "chat_template", "split": split}]
    [dataset] = imported("axolotl", AXOLOTL | {"datasets": rows}).settings["data"]["datasets"]
    assert dataset == {"path": "rows", **expected}


def test_a_part_of_a_split_that_does_not_begin_it_is_refused(imported: Importing):
    rows = [{"path": "rows", "type": "chat_template", "split": "train[10:]"}]
    with pytest.raises(
        ConfigError, match=r"yaml:\d+: datasets\[0\]\.split: train\[10:\]: rows are"
    ):
        imported("axolotl", AXOLOTL | {"datasets": rows})


def test_a_field_of_a_dataset_is_refused_at_its_line_and_can_be_dropped(imported: Importing):
    rows = [{"path": "chats.jsonl", "type": "chat_template", "drop_system_message": True}]
    with pytest.raises(ConfigError) as error:
        imported("axolotl", AXOLOTL | {"datasets": rows})
    [fault] = error.value.faults
    line = Path("theirs.yaml").read_text().splitlines().index("  drop_system_message: true") + 1
    assert fault.startswith(f"theirs.yaml:{line}: datasets[0].drop_system_message: true: no count")
    part = "datasets[0].drop_system_message"
    found = imported("axolotl", AXOLOTL | {"datasets": rows}, drop=[part])
    assert found.lines[0] == f"{part}: dropped"
    for wrong in ("datasets[3].split", "datasets[0].split", "learning_rate.x"):
        with pytest.raises(UsageError, match="there is no such key"):
            imported("axolotl", AXOLOTL | {"datasets": rows}, drop=[wrong])


def test_rows_that_axolotl_writes_as_instructions_come_with_a_note(imported: Importing):
    found = imported("axolotl", AXOLOTL | {"datasets": [{"path": "a.jsonl", "type": "alpaca"}]})
    assert any("'### Instruction: …'" in hint for hint in found.hints)


FSDP_1 = {
    "fsdp": ["full_shard", "auto_wrap"],
    "fsdp_config": {
        "fsdp_offload_params": True,
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    },
}
FSDP_2 = {
    "fsdp_version": 2,
    "fsdp_config": {"offload_params": False, "activation_checkpointing": True},
}


def test_fsdp_of_either_version_becomes_the_strategy(imported: Importing):
    first = imported("axolotl", AXOLOTL | FSDP_1)
    assert first.settings["distributed"] == {"strategy": "fsdp2", "offload": "parameters"}
    assert any(line.startswith("fsdp_config.fsdp_sharding_strategy -> ") for line in first.lines)
    second = imported("axolotl", AXOLOTL | FSDP_2)
    assert second.settings["distributed"] == {"strategy": "fsdp2"}
    assert setting(second, "training.gradient_checkpointing") is True
    # TrainingArguments read fsdp_config only beside fsdp.
    alone = imported("trl", TRL | {"fsdp_config": {"version": 2}})
    assert "distributed" not in alone.settings
    words = imported("trl", TRL | {"fsdp": "full_shard auto_wrap offload"})
    assert words.settings["distributed"] == {"strategy": "fsdp2", "offload": "parameters"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"fsdp": "shard_grad_op auto_wrap"}, "fsdp: 'shard_grad_op auto_wrap': no counterpart of"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}}, "fsdp_sharding_strategy: NO_SH"),
        ({"fsdp_config": {"fsdp_xla": True}}, "fsdp_config.fsdp_xla: True: is not known here"),
        ({"fsdp_config": "fsdp.json"}, "must be a mapping"),
    ],
)
def test_fsdp_that_divides_otherwise_is_refused(given: dict, problem: str, imported: Importing):
    with pytest.raises(ConfigError) as error:
        imported("axolotl", AXOLOTL | given)
    assert problem in error.value.faults[0]


def test_deepspeed_of_stage_0_is_ddp_and_is_compared_all_the_same(imported: Importing):
    given = {"zero_optimization": {"stage": 0, "overlap_comm": False}, "aio": {"block_size": 1}}
    found = imported("llamafactory", LLAMAFACTORY | {"deepspeed": given})
    assert found.settings["distributed"] == {"strategy": "ddp"}
    with pytest.raises(ConfigError, match=r"gradient_clipping is 0\.5, and by the other"):
        imported("llamafactory", LLAMAFACTORY | {"deepspeed": given | {"gradient_clipping": 0.5}})


def test_intervals_of_an_evaluation_without_rows_are_left_out_with_a_line(imported: Importing):
    found = imported("axolotl", AXOLOTL | {"evals_per_epoch": 2})
    assert "evaluation" not in found.settings
    told = "evaluation.evals_per_epoch -> left out: there are no rows to evaluate on"
    assert found.lines[-1] == told


def test_mixture_of_trl_becomes_the_datasets(imported: Importing):
    rows = {"path": "rows", "split": "train_sft", "fraction": 0.5, "columns": ["messages"]}
    given = {key: value for key, value in TRL.items() if key != "dataset_name"}
    mixture = [rows, {"path": "more.jsonl"}]
    found = imported("trl", given | {"datasets": mixture})
    assert found.settings["data"]["datasets"] == [
        {"path": "rows", "split": "train_sft", "subsample_factor": 0.5},
        {"path": "more.jsonl"},
    ]
    with pytest.raises(ConfigError, match=r"datasets\[0\]\.data_dir: x: no counterpart"):
        imported("trl", given | {"datasets": [{**rows, "data_dir": "x"}]})


def test_note_says_that_trl_trains_all_tokens_of_conversations(imported: Importing):
    def is_noted(system: str, given: dict) -> bool:
        return any("trains all tokens" in hint for hint in imported(system, given).hints)

    assert is_noted("trl", TRL)
    assert is_noted("trl", TRL | {"assistant_only_loss": False})
    assert not is_noted("trl", TRL | {"assistant_only_loss": True})
    assert not is_noted("trl", TRL | {"completion_only_loss": False})  # then the loss is of all
    assert not is_noted("trl", OPEN_INSTRUCT)
    assert not is_noted("llamafactory", LLAMAFACTORY)


def test_note_says_how_a_long_chat_of_llamafactory_is_cut(imported: Importing):
    assert "in proportion" in imported("llamafactory", LLAMAFACTORY).hints[0]


def test_note_says_how_plain_texts_of_neox_are_trained(imported: Importing):
    assert "data.without_kinds=train_all" in imported("neox", NEOX).hints[0]
    # Where something is missing, the hint is of that.
    without = {key: value for key, value in NEOX.items() if key != "optimizer"}
    with pytest.raises(ConfigError) as error:
        imported("neox", without)
    assert error.value.hint.startswith("training.learning_rate: ")


def test_a_word_behind_the_file_is_read_over_it(imported: Importing):
    found = imported("axolotl", AXOLOTL | {"adapter": "qlora", "lora_r": 8}, "adapter=lora")
    assert found.settings["lora"] == {"rank": 8}


def test_rewards_are_trained_of_axolotls_and_llamafactorys_pairs(imported: Importing):
    rows = [{"path": "pairs.jsonl", "type": "bradley_terry.chat_template"}]
    of_axolotl = {"reward_model": True, "num_labels": 1, "center_rewards_coefficient": 0.01}
    found = imported("axolotl", AXOLOTL | of_axolotl | {"datasets": rows})
    assert found.stage == "reward-model"
    assert found.settings["center_rewards_coefficient"] == 0.01
    columns = {"prompt": "input", **PAIR}
    assert found.settings["data"]["datasets"][0]["columns"] == columns
    known = '{"long_sft": {"file_name": "pairs.json", "ranking": true}}'
    Path("data/dataset_info.json").write_text(known)
    assert imported("llamafactory", LLAMAFACTORY | {"stage": "rm"}).stage == "reward-model"
    with pytest.raises(ConfigError, match=r"cut by pairs\.max_prompt_length and pairs\."):
        imported("llamafactory", LLAMAFACTORY | {"stage": "rm", "cutoff_len": 9})


def test_what_a_file_of_openeurollm_leaves_out_is_what_they_do(imported: Importing):
    found = imported("openeurollm", OPENEUROLLM)
    expected = {
        "data.chat_template": "olmo3",
        "sft.packing": "bfd",
        "sft.max_seq_length": 4096,
        "training.effective_batch_size": 512,
        "training.per_device_train_batch_size": 4,
        "training.learning_rate": 2e-5,
        "training.gradient_checkpointing": True,
        "training.use_liger_kernel": True,
        "training.torch_compile": True,
        "training.mixed_precision": "bf16",
        "logging.report_to": ["wandb", "tensorboard"],
        "output_base": "outputs",
    }
    assert {path: setting(found, path) for path in expected} == expected
    # A block of the other method changes nothing.
    both = {"sft": {"packing": False}, "dpo": {"beta": 1.0}}
    for method, blocks in (("sft", {"dpo": both["dpo"]}), ("dpo", {"sft": both["sft"]})):
        alone = imported("openeurollm", OPENEUROLLM | {"method": method})
        assert imported("openeurollm", OPENEUROLLM | {"method": method} | blocks).settings == (
            alone.settings
        )
    assert setting(imported("openeurollm", OPENEUROLLM | {"method": "dpo"}), "loss.beta") == 5.0


def test_stage_is_asked_for_where_no_key_shows_it(imported: Importing):
    assert imported("trl", TRL).stage == "sft"
    found = imported("trl", TRL, stage="dpo")
    assert found.stage == "dpo"
    assert found.settings["loss"] == {"beta": 0.1, "name": "dpo"}


def test_mixture_in_turns_keeps_a_dataset_that_is_there_twice_and_refuses_one_without_an_amount(
    imported: Importing,
):
    given = OPEN_INSTRUCT | {"dataset_mixer": None}
    twice = {"dataset_mixer_list": ["a.jsonl", 0.5, "a.jsonl", 0.25]}
    datasets = imported("trl", given | twice).settings["data"]["datasets"]
    assert [each["subsample_factor"] for each in datasets] == [0.5, 0.25]
    with pytest.raises(ConfigError, match=r"b\.jsonl has no amount"):
        imported("trl", given | {"dataset_mixer_list": ["a.jsonl", 1.0, "b.jsonl"]})


def test_split_of_a_file_is_told(imported: Importing):
    given = {key: value for key, value in TRL.items() if key != "dataset_name"}
    found = imported("trl", given | {"datasets": [{"path": "rows.jsonl", "split": "test"}]})
    assert any("a file has one split" in line for line in found.lines)


def test_rows_of_a_mixture_are_not_counted_for_one_dataset(imported: Importing):
    given = OPEN_INSTRUCT | {"dataset_mixer": {"a.jsonl": 1.0, "b.jsonl": 1.0}}
    with pytest.raises(ConfigError, match="of the whole mixture"):
        imported("trl", given | {"max_train_samples": 7})


@pytest.mark.parametrize(
    ("system", "base", "given"),
    [
        ("axolotl", AXOLOTL, {"datasets": 3}),
        ("axolotl", AXOLOTL, {"plugins": 1.5}),
        ("axolotl", AXOLOTL, {"report_to": [1]}),
        ("axolotl", AXOLOTL, {"rl": ["dpo"]}),
        ("axolotl", AXOLOTL, {"learning_rate": [1]}),
        ("trl", OPEN_INSTRUCT, {"checkpointing_steps": "often"}),
        ("trl", OPEN_INSTRUCT, {"dataset_mixer_list": "rows.jsonl"}),
        ("llamafactory", LLAMAFACTORY, {"gradient_accumulation_steps": [2]}),
        ("neox", NEOX, {"optimizer": "Adam"}),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(
    system: str, base: dict, given: dict, imported: Importing
):
    [key] = given
    with pytest.raises(ConfigError) as error:
        imported(system, base | given)
    assert any(f" {key}: " in fault for fault in error.value.faults)
