"""What the reference's record says, and what it notices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.models.reference import REFERENCE, Reference, weights_fingerprint

OWN = Reference("a" * 64, "b" * 64, "c" * 64, "float32")


def test_reference_round_trip(tmp_path: Path):
    assert Reference.read(tmp_path) is None
    OWN.write(tmp_path)
    assert Reference.read(tmp_path) == OWN


@pytest.mark.parametrize("name", ["weights", "tokenizer", "chat_template", "dtype"])
def test_reference_of_another_model_is_refused_by_what_differs(name: str):
    OWN.check(OWN, "rows")
    with pytest.raises(PostTrainingError, match=f"another model: {name} "):
        OWN.check(replace(OWN, **{name: "other"}), "rows")


def test_reference_of_another_backend_is_the_same_models_and_says_so(tmp_path: Path):
    of_vllm = replace(OWN, backend="vllm")
    of_vllm.write(tmp_path)
    assert Reference.read(tmp_path) == of_vllm
    assert of_vllm != OWN
    of_vllm.check(OWN, "rows")
    OWN.check(of_vllm, "rows")
    with pytest.raises(PostTrainingError, match="another model: dtype "):
        of_vllm.check(replace(OWN, dtype="other"), "rows")


def test_reference_with_other_keys_is_refused(tmp_path: Path):
    OWN.write(tmp_path)
    record = json.loads((tmp_path / REFERENCE).read_text())
    (tmp_path / REFERENCE).write_text(json.dumps({**record, "model": "x"}))
    with pytest.raises(UsageError, match=r"reference\.json: not a reference"):
        Reference.read(tmp_path)


def test_weights_fingerprint_is_of_weights_and_architecture_alone(tmp_path: Path):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    first = weights_fingerprint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("another")
    assert weights_fingerprint(tmp_path) == first
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("another")
        assert weights_fingerprint(tmp_path) != first
