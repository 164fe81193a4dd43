"""The presets that ship with the project: each is used here as a user would."""

import re
from pathlib import Path

import pytest

from post_training.config.load import PRESETS_DIR, load_config
from post_training.stages.config import InitModelConfig
from post_training.train.config import SftConfig
from post_training.train.training_config import accumulation_steps


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS_DIR.glob("tiny-*.yaml")))
def test_preset_of_a_tiny_model_needs_only_a_corpus(tmp_path, name):
    (tmp_path / "init.yaml").write_text(f"extends: preset:{name}\ncorpus: [x.jsonl]\n")
    config = load_config(InitModelConfig, tmp_path / "init.yaml")
    assert name == f"tiny-{config.architecture}"
    assert config.hidden_size == 256


# Presets of a place and a size: what their comments reckon is right.

TRAINING = sorted(
    path.stem
    for path in PRESETS_DIR.glob("*.yaml")
    if not path.stem.startswith(("tiny-", "alignment-"))
)
NUMBER = r"\d+(?:\.\d+)?(?:e\d+)?"


def comments(name: str) -> str:
    lines = (PRESETS_DIR / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def value(expression: str) -> float:
    """Of an arithmetic expression of a comment."""
    assert re.fullmatch(rf"(?:{NUMBER}|[ ()×+/*])+", expression), expression
    return eval(expression.replace("×", "*"), {"__builtins__": {}})


def load_preset(tmp_path: Path, name: str, *overrides: str) -> SftConfig:
    (tmp_path / "sft.yaml").write_text(
        f"extends: preset:{name}\n"
        "model: {path: model}\n"
        "data: {prepared: data}\n"
        "training: {num_train_epochs: 2}\n"
        "sft: {max_seq_length: 4096, packing: bfd}\n"
    )
    return load_config(SftConfig, tmp_path / "sft.yaml", overrides)


@pytest.mark.parametrize("name", TRAINING)
def test_preset_of_a_place_has_the_batch_that_it_reckons(tmp_path: Path, name: str):
    said = re.search(r"batch: (\d+) rows? × (\d+) steps × (\d+) GPUs = (\d+) rows", comments(name))
    micro, steps, num_gpus, batch = map(int, said.groups())
    nodes = re.search(r"(\d+) nodes(?: of (\d+))?", comments(name))
    per_node = nodes[2] or re.search(r"node of (\d+)", comments(name))[1]
    config = load_preset(tmp_path, name)
    assert int(nodes[1]) * int(per_node) == num_gpus
    assert micro * steps * num_gpus == batch
    assert config.training.per_device_train_batch_size == micro
    assert config.training.effective_batch_size == batch
    assert accumulation_steps(config.training, num_gpus) == steps
    config.check_ranks(num_gpus)
    assert config.training.num_steps({"num_rows": 64 * batch}) == 128


@pytest.mark.parametrize("name", TRAINING)
def test_preset_of_a_place_fits_into_the_memory_that_it_reckons(name: str):
    sums = re.findall(rf": ([^:=]+) = ({NUMBER})( GB)?", comments(name))
    for expression, result, _ in sums:
        if not expression.startswith(("1 row", "2 rows")):
            assert value(expression) == pytest.approx(float(result), rel=5e-3, abs=0.051)
    parts = [float(result) for _, result, is_memory in sums if is_memory]
    total, there_is = re.search(rf"in all: .* = ({NUMBER}) GB of (\d+)", comments(name)).groups()
    assert parts[-1] == float(total) == pytest.approx(sum(parts[:-1]))
    assert float(total) < 0.8 * int(there_is)


def test_there_is_a_preset_for_each_place_and_size():
    assert TRAINING == ["apertus-70b-alps", "apertus-8b-alps", "lumi-30b"]


def test_there_is_a_preset_for_each_step_of_alignment():
    """Used in reproducibility/align-apertus, whose test looks at what they set."""
    steps = {path.stem for path in PRESETS_DIR.glob("alignment-*.yaml")}
    named = ("filter", "generate", "logprobs", "rewards", "select", "dpo-norm", "qrpo")
    assert steps == {f"alignment-{name}" for name in named}
