"""Training reads .bin/.idx where they lie, with the masks that stand beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, sft
from helpers.tokenize_runs import document, tokenize, write_lines
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import fingerprint


@pytest.fixture(scope="module")
def prefix(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty documents of the model's own tokenizer."""
    folder = tmp_path_factory.mktemp("indexed")
    lines = [{"text": document(f"What is {a}?", "so " * (1 + a % 9))} for a in range(30)]
    tokenize(
        folder / "run",
        inputs=[write_lines(folder / "chat.jsonl", *lines)],
        tokenizer=model,
        control_tokens={"user": 3, "assistant": 4},
        eod="</s>",
        output_prefix="chat",
    )
    return folder / "run/dataset/chat"


def indexed(config: dict[str, Any], model: Path, *prefixes: Path, **data: Any) -> dict[str, Any]:
    config = changed(config, **{"model.path": str(model), "training.max_steps": 2})
    return {**config, "data": {"indexed": [str(prefix) for prefix in prefixes], **data}}


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_sft_on_indexed_data_trains_what_its_kinds_say(
    packing: str, config: dict[str, Any], model: Path, prefix: Path, tmp_path: Path
):
    counts = json.loads((prefix.parent / "counts.json").read_text())
    sft(changed(indexed(config, model, prefix), **{"sft.packing": packing}), tmp_path / "run")
    record = json.loads((tmp_path / "run/data/prepared.json").read_text())
    assert record["counts"]["num_sequences"] == 30
    assert record["counts"]["num_tokens"] == counts["num_tokens"]
    assert record["counts"]["num_trained_tokens"] == counts["num_trained_tokens"]
    # The tokens are read where they are.
    assert not list((tmp_path / "run/data").glob("*.bin"))
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_sft_on_indexed_data_cuts_what_is_too_long(
    config: dict[str, Any], model: Path, prefix: Path, tmp_path: Path
):
    settings = {"sft.max_seq_length": 24, "sft.overlong": "split"}
    again = prefix.with_name("chat_text_document")  # as GPT-NeoX's settings name it
    sft(changed(indexed(config, model, prefix, again), **settings), tmp_path / "run")
    counts = json.loads((tmp_path / "run/data/prepared.json").read_text())["counts"]
    assert counts["longest_row"] == 24
    assert counts["num_split"] > 10
    assert counts["num_rows"] > counts["num_sequences"] == 60


def test_sft_on_indexed_data_without_kinds_needs_a_word(
    config: dict[str, Any], model: Path, prefix: Path, tmp_path: Path
):
    for ending in ("bin", "idx"):
        shutil.copy(f"{prefix}_text_document.{ending}", tmp_path / f"x_text_document.{ending}")
    with pytest.raises(UsageError, match="nothing says which tokens are to be trained"):
        sft(indexed(config, model, tmp_path / "x"), tmp_path / "a")
    sft(indexed(config, model, tmp_path / "x", without_kinds="train_all"), tmp_path / "b")
    counts = json.loads((tmp_path / "b/data/prepared.json").read_text())["counts"]
    assert counts["num_trained_tokens"] == counts["num_tokens"] - 30


def test_sft_on_indexed_data_of_another_tokenizer_is_refused(
    config: dict[str, Any], init_model: Any, prefix: Path, tmp_path: Path
):
    other = init_model(tmp_path / "init", vocab_size=262)
    with pytest.raises(PostTrainingError, match=r"has id \d+, the model's tokenizer only 262"):
        sft(indexed(config, other, prefix), tmp_path / "run")


def test_fingerprint_of_a_prefix_is_of_all_its_files(prefix: Path, tmp_path: Path):
    shutil.copytree(prefix.parent, tmp_path / "copy")
    copy = tmp_path / "copy/chat"
    assert fingerprint(copy) == fingerprint(prefix)
    kinds = Path(f"{copy}_kinds_document.bin")
    kinds.write_bytes(kinds.read_bytes()[:-1] + b"\0")
    assert fingerprint(copy) != fingerprint(prefix)
    with pytest.raises(FileNotFoundError):
        fingerprint(tmp_path / "copy/cha")
