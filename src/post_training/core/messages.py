"""How keys and values are spelled in messages."""

from typing import Any

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """`data.datasets[0].path` for ("data", "datasets", 0, "path")."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).removeprefix(".")


def shown(value: Any, *, limit: int | None = 60) -> str:
    """A value on one line, cut after `limit` characters: 'text', 5e-07, null, [1, 'a'], {lr: 1}."""
    text = _one_line(value)
    return text if limit is None or len(text) <= limit else f"{text[:limit]}..."


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_one_line(below)}' for key, below in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_one_line, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
