"""LoRA: what is trained, what is left of it, and that it is the same after a kill."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import rank_file, run_sft_on_ranks
from helpers.tiny_models import MIXTURES, make_model
from post_training.core.errors import UsageError
from post_training.models.adapter import add_adapter, coverage

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module", params=["llama", "apertus"])
def base(request: Any, init_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model(tmp_path_factory.mktemp(request.param), architecture=request.param)


def with_lora(config: dict[str, Any], base: Path, **settings: Any) -> dict[str, Any]:
    return changed(config, lora=LORA, **{"model.path": str(base), **settings})


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, Any]:
    return load_file(folder / name)


def test_lora_result_is_a_plain_model_with_the_adapter_beside_it(
    base: Path, config: dict[str, Any], tmp_path: Path
):
    result = sft(with_lora(config, base), tmp_path / "run")
    assert result.artifacts == {"model": "model", "adapter": "adapter"}
    before, after = weights(base), weights(tmp_path / "run" / "model")
    adapter = weights(tmp_path / "run" / "adapter", "adapter_model.safetensors")
    assert before.keys() == after.keys()
    adapted = 0
    for name in before:
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in adapter:
            low, high = adapter[f"{prefix}A.weight"].double(), adapter[f"{prefix}B.weight"].double()
            expected = before[name].double() + 8.0 / 4 * high @ low
            torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(after[name], before[name])
            adapted += 1
        else:
            assert torch.equal(after[name], before[name]), name
    assert 2 * adapted == len(adapter)
    assert adapted == (14 if "llama" in str(base) else 12)  # linear layers, but for the last
    # In an order of its own, whatever Python's hashes are in this process.
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(settings["target_modules"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.99 * losses[0]


def test_lora_says_which_kinds_of_matrices_have_an_adapter_and_which_have_none(
    model: Path, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = {"training.max_steps": 1, "lora.target_modules": ["q_proj", "down_proj"]}
    result = sft(with_lora(config, model, **settings), tmp_path / "run")
    told = {key: value for key, value in result.metrics.items() if key.startswith("lora/")}
    assert told == {
        "lora/adapted/self_attn.q_proj": 2,
        "lora/adapted/mlp.down_proj": 2,
        **{f"lora/plain/self_attn.{name}_proj": 2 for name in "kvo"},
        **{f"lora/plain/mlp.{name}_proj": 2 for name in ("gate", "up")},
    }
    assert "lora: on 2 of 2 self_attn.q_proj, 2 of 2 mlp.down_proj; none on " in "".join(
        capsys.readouterr()
    )


def mixture(model: Path, folder: Path) -> Any:
    return make_model("deepseek_v3", model, folder, **MIXTURES["deepseek_v3"])


def test_lora_tells_of_the_shared_experts_that_peft_leaves_out(model: Path, tmp_path: Path):
    settings = {"rank": 2, "alpha": 4, "dropout": 0.0, "seed": 0}
    adapted = add_adapter(mixture(model, tmp_path / "model"), target_modules=None, **settings)
    found = coverage(adapted)
    assert {kind: n for kind, n in found.adapted.items() if kind.startswith("mlp")} == {
        "mlp.gate": 1,
        "mlp.experts.gate_up_proj": 1,
        "mlp.experts.down_proj": 1,
    }
    left_out = [f"{at}{name}_proj" for at in ("", "shared_experts.")
                for name in ("gate", "up", "down")]  # fmt: skip
    assert found.plain == {f"mlp.{name}": 1 for name in left_out}
    assert "; none on 1 mlp.gate_proj" in str(found)


def test_lora_with_dropout_on_experts_is_refused_by_the_settings_name(model: Path, tmp_path: Path):
    settings = {"rank": 2, "alpha": 4, "dropout": 0.1, "seed": 0}
    problem = (
        r"^lora.dropout: the experts of a deepseek_v3 can have no dropout \(got 0.1, must be 0"
    )
    with pytest.raises(UsageError, match=problem):
        add_adapter(mixture(model, tmp_path / "all"), target_modules=None, **settings)
    add_adapter(mixture(model, tmp_path / "one"), target_modules=["q_a_proj"], **settings)


def test_lora_killed_and_resumed_ends_in_the_same_bytes(
    base: Path, config: dict[str, Any], tmp_path: Path
):
    settings = {"training.gradient_checkpointing": True, "training.mixed_precision": "bf16"}
    adapted = with_lora(config, base, **settings)
    assert run_sft_on_ranks(adapted, tmp_path / "whole") == [0]
    point = "before the random state is saved"
    assert run_sft_on_ranks(adapted, tmp_path / "killed", kill_at=point) == [-9]
    assert run_sft_on_ranks(adapted, tmp_path / "killed", resuming=True) == [0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert "adapter/adapter_model.safetensors" in stable_files(tmp_path / "whole")


def test_lora_in_another_place_gives_the_same_bytes_without_its_name(
    base: Path, config: dict[str, Any], tmp_path: Path
):
    sft(with_lora(config, base), tmp_path / "run")
    sft(with_lora(config, base), tmp_path / "with" / "a" / "longer" / "name")
    files = stable_files(tmp_path / "run")
    assert stable_files(tmp_path / "with" / "a" / "longer" / "name") == files
    for name in files:
        content = (tmp_path / "run" / name).read_bytes()
        assert str(tmp_path).encode() not in content, name
        assert str(base.parent).encode() not in content, name


def test_lora_with_checkpointed_activations_trains_as_without(
    model: Path, config: dict[str, Any], tmp_path: Path
):
    adapted = with_lora(config, model)
    sft(adapted, tmp_path / "plain")
    sft(changed(adapted, **{"training.gradient_checkpointing": True}), tmp_path / "checkpointed")
    plain, checkpointed = metrics(tmp_path / "plain"), metrics(tmp_path / "checkpointed")
    assert [line["grad_norm"] for line in checkpointed] == [line["grad_norm"] for line in plain]
    assert plain[0]["grad_norm"] > 0


def test_lora_weights_in_bfloat16_have_a_float32_adapter(
    model: Path, config: dict[str, Any], tmp_path: Path
):
    sft(with_lora(config, model, **{"model.dtype": "bfloat16"}), tmp_path / "run")
    adapter = weights(tmp_path / "run" / "adapter", "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    merged = weights(tmp_path / "run" / "model")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


@pytest.fixture(scope="module")
def two_ranks(
    model: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run folder of two ranks that hold the whole model each."""
    run_dir = tmp_path_factory.mktemp("ranks") / "run"
    adapted = with_lora(config, model, distributed={"strategy": "ddp"})
    assert run_sft_on_ranks(adapted, run_dir, world_size=2) == [0, 0]
    return run_dir


def test_lora_two_ranks_end_with_one_adapter(
    two_ranks: Path, model: Path, config: dict[str, Any], tmp_path: Path
):
    one, other = (rank_file(two_ranks, rank, "weights").read_text() for rank in (0, 1))
    assert one == other
    assert (two_ranks / "adapter" / "adapter_model.safetensors").exists()
    sft(with_lora(config, model), tmp_path / "alone")
    lines = zip(metrics(two_ranks), metrics(tmp_path / "alone"), strict=True)
    for two, alone in lines:
        assert two["num_tokens"] == alone["num_tokens"]
        # Dropout of the adapter's input is drawn by each rank for itself.
        assert two["loss"] == pytest.approx(alone["loss"], rel=0.02)


def test_lora_under_zero3_has_the_losses_of_ddp(
    two_ranks: Path, model: Path, config: dict[str, Any], tmp_path: Path
):
    adapted = with_lora(config, model, distributed={"strategy": "zero3"})
    assert run_sft_on_ranks(adapted, tmp_path / "run", world_size=2) == [0, 0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    divided, whole = (
        [line["loss"] for line in metrics(run_dir)] for run_dir in (tmp_path / "run", two_ranks)
    )
    assert divided == pytest.approx(whole, rel=1e-3)


def test_lora_on_named_layers_adapts_no_other(model: Path, config: dict[str, Any], tmp_path: Path):
    targets = {"lora.target_modules": ["q_proj", "down_proj"]}
    sft(changed(with_lora(config, model), **targets), tmp_path / "run")
    adapter = weights(tmp_path / "run" / "adapter", "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("lm_head", "lora.target_modules: lm_head, the output layer, can have no adapter"),
        ("qproj", r"lora.target_modules: no such linear layer: qproj \(there are down_proj, "),
        ("embed_tokens", "lora.target_modules: no such linear layer: embed_tokens"),
    ],
)
def test_lora_on_a_layer_that_can_have_none_is_refused(
    target: str, problem: str, model: Path, config: dict[str, Any], tmp_path: Path
):
    targets = {"lora.target_modules": ["q_proj", target]}
    with pytest.raises(UsageError, match=problem):
        sft(changed(with_lora(config, model), **targets), tmp_path / "run")
