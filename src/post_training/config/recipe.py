"""The identity of what a stage computes, and what changed between two configurations."""

from itertools import takewhile
from typing import Any

from post_training.config.model import Config, Role, settings_by_role
from post_training.core.hashing import sha256_value
from post_training.core.messages import shown

_MOST_CHARACTERS = 60
_CHARACTERS_BEFORE_CHANGE = 20


def recipe_hash(stage_name: str, config: Config) -> str:
    """sha256 of the stage's name and its recipe settings; nothing of topology or placement."""
    return sha256_value({"stage": stage_name, "recipe": settings_by_role(config)[Role.RECIPE]})


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`training.learning_rate: 0.001 -> 0.002` for every dotted key whose value differs, sorted.

    Long values are shown from shortly before their first difference.
    """
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if key in old and key in new and sha256_value(old[key]) == sha256_value(new[key]):
            continue
        before = shown(old[key], limit=None) if key in old else "(absent)"
        after = shown(new[key], limit=None) if key in new else "(absent)"
        start = max(0, _length_in_common(before, after) - _CHARACTERS_BEFORE_CHANGE)
        lines.append(f"{key}: {_cut(before, start)} -> {_cut(after, start)}")
    return lines


def _length_in_common(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _cut(text: str, start: int) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    end = start + _MOST_CHARACTERS
    return f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
