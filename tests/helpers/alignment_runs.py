"""Rows of branches as tests write and read them."""

import json
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.is_dir():
        path = path / "dataset/rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


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
