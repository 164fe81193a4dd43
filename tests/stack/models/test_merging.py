"""Merged weights are those of the formulas, written naively in float64 value by value."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.models.merging import keep_at_random, largest, slerp
from post_training.stages.context import StageContext
from post_training.stages.weights.config import MergeConfig


def merge(run_dir: Path, **settings: Any) -> Path:
    from post_training.stages.weights.merge import run

    run_dir.mkdir(parents=True)
    result = run(MergeConfig.model_validate(settings), StageContext(run_dir))
    return run_dir / result.artifacts["model"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def three(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The base, and two models that were trained from it, as it were."""
    folders = [model]
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("merged") / f"model-{seed}"
        shutil.copytree(model, folder)
        generator = torch.Generator().manual_seed(seed)
        changed = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in weights(model).items()
        }
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    return folders


def naive(method: str, base: Any, models: Any, w: Any, d: Any, scale: float, name: str) -> Any:
    """One tensor, in Python's float64: lists of numbers, of the shape [model][value]."""
    number = len(base)
    if method == "linear":
        return [sum(w[i] * models[i][n] for i in (0, 1)) / sum(w) for n in range(number)]
    deltas = [[models[i][n] - base[n] for n in range(number)] for i in (0, 1)]
    for i in (0, 1):
        if method == "ties":
            order = sorted(range(number), key=lambda n, i=i: (-abs(deltas[i][n]), n))
            kept = set(order[: int(d[i] * number)])
            deltas[i] = [deltas[i][n] if n in kept else 0.0 for n in range(number)]
        elif method.startswith("dare"):
            mask = keep_at_random([number], d[i], 3, name, i).tolist()
            deltas[i] = [deltas[i][n] / d[i] if mask[n] else 0.0 for n in range(number)]
    result = []
    for n in range(number):
        parts = [w[i] * deltas[i][n] for i in (0, 1)]
        if method in ("task_arithmetic", "dare_linear"):
            change = sum(parts)
        else:
            sign = 1 if sum(parts) >= 0 else -1
            agree = [i for i in (0, 1) if parts[i] * sign > 0]
            change = sum(parts[i] for i in agree) / sum(w[i] for i in agree) if agree else 0.0
        result.append(base[n] + scale * change)
    return result


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
)
def test_merge_is_the_formula_in_float64_rounded_once(
    method: str, three: list[Path], tmp_path: Path
):
    w, d, scale = [0.7, 0.4], [0.5, 0.25], 0.9
    sparse = "ties" in method or "dare" in method
    models = [
        {"path": three[i + 1], "weight": w[i], **({"density": d[i]} if sparse else {})}
        for i in (0, 1)
    ]
    settings = {"base": three[0], "scale": scale} if method != "linear" else {}
    made = merge(tmp_path / "run", method=method, models=models, seed=3, **settings)
    found, given = weights(made), [weights(folder) for folder in three]
    assert found.keys() == given[0].keys()
    for name in ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
        base, *others = ([*each[name].double().flatten().tolist()] for each in given)
        numbers = naive(method, base, others, w, d, scale, name)
        expected = torch.tensor(numbers, dtype=torch.float64).float()
        # Sums of three float64 in another order may round to another float32, one step away.
        torch.testing.assert_close(found[name].flatten(), expected, rtol=2e-7, atol=1e-9)


def test_slerp_goes_along_the_arc_and_straight_where_nearly_parallel():
    one, other = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
    found = slerp(one, other, 1 / 3)
    expected = [2 * math.cos(math.pi / 6), 2 * math.sin(math.pi / 6)]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    near = torch.tensor([2.0, 1e-3]).double()
    assert torch.equal(slerp(one, near, 0.25), 0.75 * one + 0.25 * near)


def test_merge_by_slerp_is_the_arc_written_naively(three: list[Path], tmp_path: Path):
    models = [{"path": folder} for folder in three[1:]]
    found = weights(merge(tmp_path / "run", method="slerp", t=0.3, models=models))
    one, other = (weights(folder) for folder in three[1:])
    angles = []
    for name in ("model.norm.weight", "model.layers.0.self_attn.k_proj.weight"):
        a, b = (each[name].double().flatten().tolist() for each in (one, other))
        lengths = [math.sqrt(sum(value * value for value in each)) for each in (a, b)]
        angle = math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / math.prod(lengths))
        shares = [math.sin(0.7 * angle) / math.sin(angle), math.sin(0.3 * angle) / math.sin(angle)]
        expected = [shares[0] * x + shares[1] * y for x, y in zip(a, b, strict=True)]
        torch.testing.assert_close(
            found[name].flatten().double(), torch.tensor(expected).double(), rtol=2e-7, atol=1e-9
        )
        angles.append(angle)
    assert max(angles) > 0.1  # else all of it was along the line


def test_largest_keeps_exactly_so_many_also_of_equal_ones():
    values = torch.tensor([1.0, -3.0, 1.0, 2.0, -1.0, 0.0])
    assert largest(values, 0.5).tolist() == [1.0, -3.0, 0.0, 2.0, 0.0, 0.0]
    assert largest(values, 0.1).tolist() == [0.0] * 6


def test_merge_twice_gives_the_same_bytes(three: list[Path], tmp_path: Path):
    models = [{"path": folder, "density": 0.5} for folder in three[1:]]
    settings = {"method": "dare_ties", "base": three[0], "models": models}
    first = hash_files(merge(tmp_path / "a", **settings))
    assert hash_files(merge(tmp_path / "b", **settings)) == first
    files = hash_files(merge(tmp_path / "c", **settings, seed=1))
    assert files["model.safetensors"] != first["model.safetensors"]


def test_merge_of_an_adapter_is_base_plus_product(three: list[Path], tmp_path: Path):
    name = "model.layers.0.self_attn.q_proj"
    base = weights(three[0])
    out, width = base[f"{name}.weight"].shape
    a, b = torch.randn(4, width), torch.randn(out, 4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    prefix = f"base_model.model.{name}"
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    run = {"method": "linear", "base": three[0], "models": [{"path": adapter}]}
    found = weights(merge(tmp_path / "run", **run))
    expected = (base[f"{name}.weight"].double() + 1.5 * (b.double() @ a.double())).float()
    assert torch.equal(found[f"{name}.weight"], expected)
    assert all(torch.equal(found[each], base[each]) for each in base if each != f"{name}.weight")
    for other in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        (adapter / "adapter_config.json").write_text(json.dumps({**settings, **other}))
        [(name, value)] = other.items()
        with pytest.raises(PostTrainingError, match=f"{name} is {value!r}, must be"):
            merge(tmp_path / name, **run)


@pytest.mark.parametrize("rslora", [False, True])
def test_merge_of_an_adapter_is_what_peft_merges(rslora: bool, three: list[Path], tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(three[0], dtype=torch.float32)
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,  # B is random too, else the addition is 0
    )
    adapted = get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    models = [{"path": tmp_path / "adapter"}]
    run = {"method": "linear", "base": three[0], "models": models}
    found = weights(merge(tmp_path / "run", **run))
    merged = adapted.merge_and_unload().state_dict()
    before = weights(three[0])
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert changed == {
        name for name in found if name.endswith(("q_proj.weight", "down_proj.weight"))
    }
    for name in found:
        # PEFT multiplies and adds in float32.
        torch.testing.assert_close(found[name], merged[name], rtol=1e-6, atol=1e-6)


def test_merge_refuses_models_that_are_not_alike(three: list[Path], tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(three[1], other)
    settings = {"method": "linear", "models": [{"path": three[1]}, {"path": other}]}
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(PostTrainingError, match=r"rms_norm_eps is 0\.5"):
        merge(tmp_path / "settings", **settings)
    (other / "config.json").write_text(json.dumps(config))
    own = weights(other)
    halved = {name: value.bfloat16() for name, value in own.items()}
    save_file(halved, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="several dtypes"):
        merge(tmp_path / "dtypes", **settings)
    made = merge(tmp_path / "chosen", **settings, dtype="bfloat16")
    assert {value.dtype for value in weights(made).values()} == {torch.bfloat16}
    assert json.loads((made / "config.json").read_text())["dtype"] == "bfloat16"
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(PostTrainingError, match="its chat template is not that of"):
        merge(tmp_path / "templates", **settings, dtype="float32")
    merge(tmp_path / "with-template", **settings, dtype="float32", tokenizer=three[0])
    (other / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(PostTrainingError, match="cut off, or no safetensors file"):
        merge(tmp_path / "cut", **settings)
    assert not (tmp_path / "cut/model").exists()


def test_merge_refuses_settings_that_do_nothing(tmp_path: Path):
    pair = [{"path": "a"}, {"path": "b", "density": 0.5}]
    for settings, words in (
        ({"method": "ties", "models": pair}, "base: ties needs"),
        ({"method": "linear", "models": pair}, "density is for ties and dare"),
        ({"method": "slerp", "models": pair[:1]}, "slerp is between 2 models"),
        ({"method": "linear", "models": pair[:1], "t": 0.1}, "t: only with method: slerp"),
    ):
        with pytest.raises((ConfigError, ValueError), match=words):
            MergeConfig.model_validate(settings)


def test_merge_refuses_what_is_no_model_or_adapter(three: list[Path], tmp_path: Path):
    other = shutil.copytree(three[1], tmp_path / "other")
    own = weights(other)
    settings = {"method": "linear", "models": [{"path": three[1]}, {"path": other}]}

    def refusal(name: str) -> str:
        with pytest.raises(PostTrainingError) as raised:
            merge(tmp_path / name, **settings)
        assert not list((tmp_path / name).iterdir())
        return str(raised.value)

    norm = "model.norm.weight"
    spoilt = {**own, norm: own[norm].clone().fill_(math.nan)}
    save_file(spoilt, other / "model.safetensors", metadata={"format": "pt"})
    assert refusal("nan") == f"{other}: {norm} holds NaN or infinity"
    (other / "model.safetensors").unlink()
    (other / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "must have a weight_map" in refusal("index")
    (other / "adapter_config.json").write_text("{")
    settings["base"] = three[0]
    assert "adapter_config.json: malformed JSON" in refusal("json")
    plain = {"peft_type": "LORA", "r": 0, "lora_alpha": 6, "bias": "none"}
    (other / "adapter_config.json").write_text(json.dumps(plain))
    assert "r and lora_alpha must be a number > 0 and a number (got 0 and 6)" in refusal("rank")


def test_merge_to_float16_refuses_values_that_would_become_infinite(
    three: list[Path], tmp_path: Path
):
    other = shutil.copytree(three[1], tmp_path / "other")
    large = {name: value * 1e7 for name, value in weights(other).items()}
    save_file(large, other / "model.safetensors", metadata={"format": "pt"})
    models = [{"path": three[1]}, {"path": other}]
    with pytest.raises(PostTrainingError, match=r"has values up to .*, and float16 ends at 65504"):
        merge(tmp_path / "run", method="linear", models=models, dtype="float16")
