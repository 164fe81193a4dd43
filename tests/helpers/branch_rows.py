"""Rows of branches, and the data block that reads them."""

from pathlib import Path
from typing import Any


def data(path: Path, **more: Any) -> dict[str, Any]:
    """The data block that reads what a stage left in `path`, or a file."""
    if path.is_dir():
        path = path / "dataset/rows.jsonl"
    return {"datasets": [{"path": str(path)}], **more}


def branch(text: str, *, is_reference: bool = True, **figures: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "assistant", "parts": [{"type": "response", "content": text}]}],
        "is_reference_completion": is_reference,
        **figures,
    }


def prompt_row(row_id: str, prompt: str, branches: list[dict[str, Any]], **more: Any) -> dict:
    return {
        "conversation_id": row_id,
        "dataset_source": "sums",
        "initial_prompt": {"role": "user", "content": prompt},
        "conversation_branches": branches,
        **more,
    }
