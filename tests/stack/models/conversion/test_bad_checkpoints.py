"""What is wrong with a checkpoint is said in one line, and nothing is left of the attempt."""

import random
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import make_model
from post_training.core.errors import PostTrainingError
from post_training.stages.context import StageContext
from post_training.stages.weights.config import ConvertConfig

DIST = "release"
RANK = "release/mp_rank_01/model_optim_rng.pt"


def convert(run_dir: Path, **settings: Any) -> Path:
    from post_training.stages.weights.convert import run

    run_dir.mkdir(parents=True)
    result = run(ConvertConfig.model_validate(settings), StageContext(run_dir))
    return run_dir / next(iter(result.artifacts.values()))


def refusal(run_dir: Path, **settings: Any) -> str:
    with pytest.raises(PostTrainingError) as raised:
        convert(run_dir, **settings)
    assert not list(run_dir.iterdir())
    assert "\n" not in raised.value.problem
    return str(raised.value)


@pytest.fixture(scope="module")
def source(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    make_model("llama", model, folder, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return folder


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format, that of `torch` of two tensor-parallel ranks."""
    root = tmp_path_factory.mktemp("written")
    kinds = {"torch_dist": {}, "torch": {"tensor_parallel_size": 2}}
    return {
        kind: convert(
            root / kind, checkpoint=source, to="megatron", megatron={"format": kind, **ranks}
        )
        for kind, ranks in kinds.items()
    }


def change_torch(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)
    torch.save(change(content), path)


def with_arguments(**changed: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        def change(content: dict[str, Any]) -> dict[str, Any]:
            return {**content, "args": Namespace(**{**vars(content["args"]), **changed})}

        change_torch(folder / DIST / "common.pt", change)

    return spoil


def overwrite(name: str, data: bytes | None) -> Callable[[Path], None]:
    """data: None for zeros, as many as there were bytes."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_bytes(bytes(path.stat().st_size) if data is None else data)

    return spoil


def with_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """One weight of the second rank is another."""
    name = "decoder.layers.0.self_attention.linear_proj.weight"

    def spoil(folder: Path) -> None:
        def changed(content: dict[str, Any]) -> dict[str, Any]:
            return {**content, "model": {**content["model"], name: change(content["model"][name])}}

        change_torch(folder / RANK, changed)

    return spoil


SPOILT: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no JSON": ("torch_dist", overwrite(f"{DIST}/metadata.json", b"{"), "malformed JSON"),
    "list": ("torch_dist", lambda f: torch.save([1], f / DIST / "common.pt"), "holds a list, must"),
    "no common": ("torch_dist", overwrite(f"{DIST}/common.pt", b"x"), "not a file of PyTorch"),
    "empty common": ("torch_dist", overwrite(f"{DIST}/common.pt", b""), "not a file of PyTorch"),
    "no metadata": (
        "torch_dist",
        overwrite(f"{DIST}/.metadata", b"\x80\x04garbage"),
        "cut off, or not a checkpoint of torch.distributed",
    ),
    "zeros": ("torch_dist", overwrite(f"{DIST}/__0_0.distcp", None), "no chunk of a tensor of"),
    "layers": ("torch_dist", with_arguments(num_layers="2"), "num_layers is '2', must be an integ"),
    "no heads": ("torch_dist", with_arguments(num_attention_heads=0), "num_attention_heads is 0"),
    "odd groups": ("torch_dist", with_arguments(num_query_groups=3), "num_query_groups is 3, must"),
    "no width": ("torch_dist", with_arguments(hidden_size=None), "its settings lack hidden_size"),
    "no model": (
        "torch",
        lambda f: change_torch(f / RANK, lambda content: {**content, "model": None}),
        "mp_rank_01/model_optim_rng.pt: there is no 'model' in it",
    ),
    "smaller": (
        "torch",
        with_weight(lambda w: w[:, :8].clone()),
        "mp_rank_01/model_optim_rng.pt: ",
    ),
    "other dtype": ("torch", with_weight(lambda w: w.bfloat16()), "in torch.bfloat16, must be"),
    "cut": (
        "torch",
        lambda f: overwrite(RANK, (f / RANK).read_bytes()[:-99])(f),
        "mp_rank_01/model_optim_rng.pt: cut off, or not a file of PyTorch",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_convert_of_a_spoilt_checkpoint_of_megatron_says_what_is_wrong(
    case: str, written: dict[str, Path], model: Path, tmp_path: Path
):
    kind, spoil, words = SPOILT[case]
    folder = shutil.copytree(written[kind], tmp_path / "checkpoint")
    spoil(folder)
    assert words in refusal(tmp_path / "run", checkpoint=folder, tokenizer=model)


def test_convert_of_weights_in_8_bits_is_refused(
    written: dict[str, Path], model: Path, tmp_path: Path
):
    folder = shutil.copytree(written["torch"], tmp_path / "checkpoint")
    name = "decoder.layers.0.self_attention.linear_proj.weight"

    def change(content: dict[str, Any]) -> dict[str, Any]:
        own = content["model"]
        return {**content, "model": {**own, name: own[name].to(torch.float8_e4m3fn)}}

    for path in folder.glob("release/*/*.pt"):
        change_torch(path, change)
    told = refusal(tmp_path / "run", checkpoint=folder, tokenizer=model)
    assert f"{name} is in float8_e4m3fn, must be in float32" in told


def change_weight(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights[name] = change(weights[name])
        kept = {name: weight for name, weight in weights.items() if weight is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def with_index(text: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


K = "model.layers.0.self_attn.k_proj.weight"
SPOILT_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "columns": (change_weight(K, lambda w: w[:, :-1].clone()), f"{K} is \\[32, 31\\], must be"),
    "rows": (change_weight(K, lambda w: w[:-2].clone()), f"{K} is \\[30, 32\\], must be"),
    "missing": (change_weight(K, lambda w: None), f"{K} is missing"),
    "integers": (change_weight(K, lambda w: w.to(torch.int8)), f"{K} is in int8, must be"),
    "no index": (with_index("{"), "malformed JSON"),
    "no map": (with_index("{}"), "must have a weight_map"),
    "outside": (with_index('{"weight_map": {"x": "../y"}}'), "names a file that is not in the fol"),
    "gone": (with_index('{"weight_map": {"x": "y"}}'), "y: the file is missing"),
    "no config": (overwrite("config.json", b"[]"), "config.json: must be a JSON object"),
}


@pytest.mark.parametrize("case", SPOILT_MODELS)
def test_convert_of_a_spoilt_model_to_megatron_says_what_is_wrong(
    case: str, source: Path, tmp_path: Path
):
    spoil, words = SPOILT_MODELS[case]
    folder = shutil.copytree(source, tmp_path / "model")
    spoil(folder)
    assert re.search(words, refusal(tmp_path / "run", checkpoint=folder, to="megatron"))


def test_convert_of_what_is_converted_already_says_so(
    source: Path, written: dict[str, Path], model: Path, tmp_path: Path
):
    told = refusal(tmp_path / "one", checkpoint=source, tokenizer=model)
    assert "it is a model of Hugging Face already" in told
    told = refusal(tmp_path / "two", checkpoint=written["torch"], to="megatron")
    assert "a checkpoint of Megatron-LM or GPT-NeoX, must be a model of Hugging Face" in told


def test_convert_of_a_config_that_is_none_is_refused(
    written: dict[str, Path], model: Path, tmp_path: Path
):
    settings = {"checkpoint": written["torch"], "tokenizer": model}
    for number, (text, words) in enumerate(
        {
            "{": "malformed JSON",
            '{"model_type": "llama", "eos_token_id": "x"}': "no settings of this model",
            '{"model_type": "llama", "eos_token_id": []}': "eos_token_id: must be the id of",
            '{"model_type": "llama", "rope_parameters": 3}': "no settings of this model",
        }.items()
    ):
        named = tmp_path / f"{number}.json"
        named.write_text(text)
        told = refusal(tmp_path / f"run-{number}", **settings, config=named)
        assert str(named) in told
        assert words in told


def test_convert_of_several_of_other_sizes_names_the_first_that_differs(
    source: Path, model: Path, tmp_path: Path
):
    folders = [
        convert(
            tmp_path / f"there-{divisor}",
            checkpoint=source,
            to="megatron",
            megatron={"make_vocab_size_divisible_by": divisor},
        )
        for divisor in (128, 512)
    ]
    told = refusal(
        tmp_path / "mean", checkpoint=folders[0], tokenizer=model, average_with=folders[1:]
    )
    assert "embedding.word_embeddings.weight is [512, " in told


def test_convert_to_float16_refuses_values_that_would_become_infinite(source: Path, tmp_path: Path):
    folder = shutil.copytree(source, tmp_path / "model")
    change_weight(K, lambda w: w + 1e5)(folder)
    told = refusal(tmp_path / "run", checkpoint=folder, to="megatron", dtype="float16")
    assert "linear_qkv.weight has values up to 10000" in told


def test_convert_says_which_tensors_change_their_dtype(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = shutil.copytree(source, tmp_path / "model")
    change_weight("model.embed_tokens.weight", lambda w: w.bfloat16())(folder)
    convert(tmp_path / "run", checkpoint=folder, to="megatron")
    told = capsys.readouterr().err
    assert re.search(r"\d+ of \d+ tensors become torch.bfloat16, as the embeddings are", told)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_convert_of_files_with_other_bytes_works_or_says_what_is_wrong(
    kind: str, written: dict[str, Path], model: Path, tmp_path: Path
):
    chance = random.Random(kind)
    source = written[kind] / DIST
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for number in range(80):
        folder = shutil.copytree(source, tmp_path / f"{number}")
        path = folder / chance.choice(names)
        data = bytearray(path.read_bytes())
        if chance.random() < 0.5:
            del data[chance.randrange(len(data)) :]
        else:
            start = chance.randrange(len(data))
            data[start : start + 16] = chance.randbytes(min(16, len(data) - start))
        path.write_bytes(data)
        run_dir = tmp_path / f"run-{number}"
        try:
            convert(run_dir, checkpoint=folder, tokenizer=model)
        except PostTrainingError:
            assert not list(run_dir.iterdir())
        shutil.rmtree(folder)
        shutil.rmtree(run_dir, ignore_errors=True)
