"""What `convert` writes for Megatron it reads again: the weights of the model that they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.tiny_models import make_model
from post_training.core.errors import PostTrainingError, UsageError
from post_training.stages.context import StageContext
from post_training.stages.weights.config import ConvertConfig

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**GROUPED, "head_dim": 16}),
    "tied": ("apertus", {**GROUPED, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {**GROUPED, "num_local_experts": 4, "head_dim": 8}),
}


def convert(run_dir: Path, **settings: Any) -> Path:
    from post_training.stages.weights.convert import run

    run_dir.mkdir(parents=True)
    result = run(ConvertConfig.model_validate(settings), StageContext(run_dir))
    return run_dir / next(iter(result.artifacts.values()))


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_convert_to_megatron_and_back_gives_the_same_weights(
    name: str, kind: str, model: Path, tmp_path: Path
):
    model_type, settings = MODELS[name]
    make_model(model_type, model, tmp_path / "source", **settings)
    megatron: dict[str, Any] = {"format": kind}
    if kind == "torch":
        megatron |= {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
        megatron["expert_parallel_size"] = 2 if name == "mixtral" else 1
    written = convert(
        tmp_path / "there", checkpoint=tmp_path / "source", to="megatron", megatron=megatron
    )
    back = convert(tmp_path / "back", checkpoint=written, tokenizer=model)
    found = load_file(back / "model.safetensors")
    expected = load_file(tmp_path / "source/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_convert_of_several_is_their_mean_and_names_what_is_wrong(model: Path, tmp_path: Path):
    settings = MODELS["llama"][1]
    source = make_model("llama", model, tmp_path / "source", **settings)
    with torch.no_grad():
        for weights in source.parameters():
            weights.add_(1.0)
    source.save_pretrained(tmp_path / "other")
    folders = [
        convert(tmp_path / f"there-{name}", checkpoint=tmp_path / name, to="megatron")
        for name in ("source", "other")
    ]
    made = {"checkpoint": folders[0], "tokenizer": model}
    mean = load_file(
        convert(tmp_path / "mean", **made, average_with=folders[1:]) / "model.safetensors"
    )
    one, other = (load_file(tmp_path / n / "model.safetensors") for n in ("source", "other"))
    for name, found in mean.items():
        expected = ((one[name].double() + other[name].double()) / 2).float()
        assert torch.equal(found, expected)
    with pytest.raises(UsageError, match="must be ≥"):
        convert(tmp_path / "small", **made, vocab_size=5)
    chunks = folders[0] / "release/__0_0.distcp"
    content = chunks.read_bytes()
    chunks.write_bytes(content[: len(content) // 2])
    with pytest.raises(PostTrainingError, match=f"{chunks}: cut off: .* bytes, must be ≥"):
        convert(tmp_path / "cut", **made)
    chunks.unlink()
    with pytest.raises(PostTrainingError, match=f"{chunks}: the file is missing"):
        convert(tmp_path / "missing", **made)
    assert not (tmp_path / "missing/model").exists()
