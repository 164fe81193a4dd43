"""Bytes of tokens as a person can read them: nothing invisible, nothing that steers a terminal.

    ↵ line break   ⇥ tab   · space   ⟨e2 96⟩ bytes of a part of a character   ⟨U+200B⟩ invisible

A single space between words is left as it is, unless every space is asked for.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from post_training.data.inspection.vocabulary import Spelled

_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍", " ": "·"}
# Control and format characters, unassigned ones, and spaces that look like another or like none.
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"}
# Joiners are part of how emoji and several scripts are written.
_JOINERS = ("\u200c", "\u200d")
# Bytes that are no UTF-8 (as surrogateescape has them), and characters that may need a mark.
_BYTES, _UNUSUAL = "[\udc80-\udcff]+", "[^ -~]"
_UNUSUAL_OR_ANY_SPACE = re.compile(f"{_BYTES}|{_UNUSUAL}| ")
_UNUSUAL_OR_ODD_SPACE = re.compile(rf"{_BYTES}|{_UNUSUAL}|(?<!\S) | (?!\S)")


@dataclass(frozen=True)
class Stretch:
    """style: plain text, a mark of ours, or a special token."""

    text: str
    style: Literal["plain", "mark", "special"] = "plain"


def stretches_of_run(tokens: Sequence[Spelled]) -> Iterator[Stretch]:
    """Tokens as one text, so that characters of several tokens are whole. A line break is its mark
    and itself."""
    content = b""
    for token in tokens:
        if token.is_special:
            yield from _stretches(content, _UNUSUAL_OR_ODD_SPACE)
            content = b""
            yield _special(token)
        else:
            content += token.content
    yield from _stretches(content, _UNUSUAL_OR_ODD_SPACE)


def stretches_of_token(token: Spelled) -> Iterator[Stretch]:
    """One token, every space of it visible; a line break is its mark alone."""
    if token.is_special:
        yield _special(token)
        return
    for stretch in _stretches(token.content, _UNUSUAL_OR_ANY_SPACE):
        if text := stretch.text.replace("\n", ""):
            yield Stretch(text, stretch.style)


def _special(token: Spelled) -> Stretch:
    shown = _stretches(token.content, _UNUSUAL_OR_ODD_SPACE)
    return Stretch("".join(stretch.text for stretch in shown), "special")


def _stretches(content: bytes, to_check: re.Pattern[str]) -> Iterator[Stretch]:
    text = content.decode(errors="surrogateescape")
    position = 0
    for match in to_check.finditer(text):
        if (mark := _mark(match[0])) is None:
            continue
        if position < match.start():
            yield Stretch(text[position : match.start()])
        yield Stretch(mark, "mark")
        position = match.start() if match[0] == "\n" else match.end()
    if position < len(text):
        yield Stretch(text[position:])


def _mark(found: str) -> str | None:
    if "\udc80" <= found[0] <= "\udcff":
        return f"⟨{found.encode(errors='surrogateescape').hex(' ')}⟩"
    if found in _MARKS:
        return _MARKS[found]
    if found not in _JOINERS and unicodedata.category(found) in _INVISIBLE:
        return f"⟨U+{ord(found):04X}⟩"
    return None
