"""The fenced blocks of the documentation, and what their marks say about running them.

    <!-- not run: WHY -->                    above a block of `sh`: no test runs it
    <!-- no block here is run: WHY -->       anywhere in a page: of none of its blocks
    <!-- run after the page of the laptop --> above a block: by a long test, in that page's folder

Every other block of `sh` is run by a test. A block whose first line is `# NAME.yaml` (or .py) is
that file.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "installation").rglob("*.md")),
]
LAPTOP = REPOSITORY / "docs/start/laptop.md"
AFTER_LAPTOP = "<!-- run after the page of the laptop -->"
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: .+ -->")
_NONE_IS_RUN = re.compile(r"^<!-- no block here is run: .+ -->$", re.MULTILINE)
_FILE = re.compile(r"# (\S+\.(?:yaml|py))\n")


@dataclass(frozen=True)
class Block:
    """mark: the comment above it, "" without one. text: without the page's indentation."""

    language: str
    text: str
    mark: str

    @property
    def file_name(self) -> str | None:
        found = _FILE.match(self.text)
        return found[1] if found else None


def blocks_of(page: Path, language: str) -> Iterator[Block]:
    """The page's blocks of the language, in order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        if found[2] == language:
            before = text[: found.start()].rstrip().rpartition("\n")[2].strip()
            mark = before if before.startswith("<!--") else ""
            lines = [line.removeprefix(found[1]) for line in found[3].splitlines()]
            yield Block(language, "\n".join(lines) + "\n", mark)


def blocks_without_mark(page: Path) -> list[Block]:
    """Those of `sh` that a test has to run."""
    if _NONE_IS_RUN.search(page.read_text()):
        return []
    return [block for block in blocks_of(page, "sh") if not block.mark]


def unknown_marks(page: Path) -> list[str]:
    """Comments above blocks of `sh` that mean nothing to a test."""
    marks = {block.mark for block in blocks_of(page, "sh")} - {"", AFTER_LAPTOP}
    return sorted(mark for mark in marks if not _NOT_RUN.fullmatch(mark))
