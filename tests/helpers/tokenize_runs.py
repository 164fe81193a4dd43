"""Documents with control markers, a SentencePiece model (markers at 7 and 8, EOD at 3), and the
stage run on them."""

import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.stages.config import TokenizeConfig
from post_training.stages.context import StageContext

SYMBOLS = ["<|endoftext|>", "<|system|>", "<|a|>", "<|b|>", "<|user|>", "<|assistant|>"]
CORPUS = [f"What is {a} + {b}?\nIt is {a + b}, she says." for a in range(40) for b in range(5)]


def train_model(path: Path, corpus: Iterable[str] = CORPUS, **settings: Any) -> Path:
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(corpus),
            "model_writer": written,
            "vocab_size": 400,
            "model_type": "bpe",
            "byte_fallback": True,
            "user_defined_symbols": SYMBOLS,
            "hard_vocab_limit": False,
            "num_threads": 1,
            "minloglevel": 3,
            **settings,
        }
    )
    path.write_bytes(written.getvalue())
    return path


def document(*turns: str) -> str:
    """The turns between their markers, the user's first."""
    markers = ("<<<|user|>>>", "<<<|assistant|>>>")
    marked = [f"{markers[i % 2]}{turn}{markers[i % 2]}" for i, turn in enumerate(turns)]
    return "".join(marked)


def tokenize(run_dir: Path, **settings: Any) -> dict[str, float]:
    from post_training.stages.tokenize import run

    run_dir.mkdir(exist_ok=True)
    result = run(TokenizeConfig.model_validate(settings), StageContext(run_dir))
    assert result.artifacts == {"dataset": "dataset"}
    return result.metrics


def write_lines(path: Path, *lines: bytes | str | dict[str, Any]) -> Path:
    texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


GOOD = {"text": document("What is 2 + 2?", "It is 4, she says.")}
OTHER = {"text": document("1?", "It is 1", "And 2 + 3?", "5")}


def tokenize_with_two_workers(data: Path, model: Path, run_dir: Path) -> None:
    """The target of a process: exit code 1 for an error, which is in `<run_dir>.error`."""
    try:
        tokenize(run_dir, inputs=[data], tokenizer=model, num_workers=2)
    except PostTrainingError as error:
        run_dir.with_suffix(".error").write_text(str(error))
        sys.exit(1)
