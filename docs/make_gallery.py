"""docs/reference/templates.md: what `post-training template check` says of each template.

It runs inside the image, which has TRL's templates (`make docs-gallery`).
"""

import re
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.chat.published import read_template
from post_training.data.chat.templates import MARKERS
from post_training.data.config import PUBLISHED_TEMPLATES
from post_training.data.inspection.template_check import Finding, TemplateReport, check_template

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/reference/templates.md"
# Beside the repository, as its tests have it; not part of it.
TOKENIZERS = REPOSITORY.parent / "shared/data/tokenizers"
HEAD = """# Gallery of chat templates

What `post-training template check` says of each template: of ours, and of those that TRL 1.16
ships. Each is tried on a small tokenizer that has its special tokens.
[Chat templates](../guides/templates.md) explains the words. This page is written by
`make docs-gallery`; a test compares it.

- **turns**: how the trained turns are found: by marks in the template, or by the prompts of a
  server.
- **not**: what the template cannot express. A row that needs it is refused.
- **history**: *kept* if earlier turns stay as they were said. *thoughts left out*, *another form*,
  or *system, tools move* to the last message of the user: such a conversation of several turns
  becomes several rows (`data.history_thoughts`).
- **server**: *yes* if the last turn of each example comes after exactly what a server sends.
  `apertus` has *no* for one thing: two messages of the assistant in a row are one turn there, not
  for a server.

A template that cannot be used has the reason instead.
"""
REAL = """## With real tokenizers

The tokenizer's own template (`model`), and those of ours that it has the tokens of.
"""
DATE = date(2026, 1, 31)
_SPECIAL = re.compile(
    r"<[|｜][^<>|｜'\"{}]+[|｜]>|</?(?:start|end)_of_turn>|\[/?[A-Z_]+\]|<\|[A-Z_]+\|>"
)
_TITLES = "| template | turns | not | history | server |\n|---|---|---|---|---|\n"


def tokenizer_for(text: str) -> Any:
    """A tokenizer that has the special tokens which a template writes."""
    from post_training.models.save import train_tokenizer

    markers = {marker for own in MARKERS.values() for marker in own}
    own = sorted({*_SPECIAL.findall(text), *markers})
    return train_tokenizer([], 300 + len(own), tuple(own), chat_template=text)


def row_of(name: str, report: TemplateReport) -> str:
    """A line of the table."""
    found = {finding.subject: finding for finding in report.findings}
    use = found["use"]
    if use.outcome == "fail":
        said = use.said.partition(" (hint")[0].replace("|", "\\|").replace("\n", "↵")
        return f"| {name} | cannot be used: {said} | | | |"
    lost = found["expresses"].said.removeprefix("no ").removesuffix(": refused")
    return (
        f"| {name} | {use.said.removeprefix('turns are found by ')} "
        f"| {'' if found['expresses'].outcome == 'pass' else lost} "
        f"| {_history(found['history'])} "
        f"| {'yes' if found['server'].outcome == 'pass' else 'no'} |"
    )


def _history(finding: Finding) -> str:
    if finding.outcome == "pass":
        return "kept"
    moved = re.search(r"writes (.*) with the last message", finding.said)
    if moved is not None:
        return f"{moved[1].replace(' and ', ', ')} move"
    return "thoughts left out" if "earlier thoughts" in finding.said else "another form"


def gallery() -> str:
    """The page but for the real tokenizers. Errors: those of a template that is not one."""
    lines = [HEAD, "## Ours\n", _TITLES.rstrip()]
    every = tokenizer_for("")
    lines += [row_of(f"`{name}`", check_template(name, every)) for name in MARKERS]
    for name in (name for name, file in PUBLISHED_TEMPLATES.items() if file is None):
        text = read_template(name, every)
        today = DATE if "strftime_now" in text else None
        lines.append(row_of(f"`{name}`", check_template(name, tokenizer_for(text), today=today)))
    lines += ["\n## Those that TRL ships\n"]
    lines += [
        "Those with a name can be used by it: `data.chat_template: NAME`.\n",
        _TITLES.rstrip(),
    ]
    names = {file: name for name, file in PUBLISHED_TEMPLATES.items() if file is not None}
    for file in sorted((resources.files("trl") / "chat_templates").iterdir(), key=lambda f: f.name):
        stem = file.name.removesuffix(".jinja")
        if not file.name.endswith(".jinja") or stem.endswith("_training"):
            continue
        text = file.read_text(encoding="utf-8")
        own = tokenizer_for(text)
        today = DATE if "strftime_now" in text else None
        called = f"{file.name}, `{names[stem]}`" if stem in names else file.name
        lines.append(row_of(called, check_template("model", own, today=today)))
    return "\n".join(lines) + "\n"


def of_real_tokenizers() -> str:
    """That part of the page: each one's own template, and ours that it has the tokens of."""
    from post_training.models.load import load_tokenizer

    lines = ["", REAL, _TITLES.rstrip()]
    for folder in sorted(each for each in TOKENIZERS.iterdir() if each.is_dir()):
        try:
            own = load_tokenizer(folder)
        except PostTrainingError as error:
            lines.append(f"| {folder.name} | cannot be loaded: {error.problem} | | | |")
            continue
        vocabulary = own.get_vocab()
        fitting = [
            name for name, markers in MARKERS.items() if all(each in vocabulary for each in markers)
        ]
        for name in ("model", *fitting):
            lines.append(row_of(f"{folder.name}, `{name}`", check_template(name, own)))
    return "\n".join(lines) + "\n"


def main() -> None:
    _, title, rows = PAGE.read_text(encoding="utf-8").partition(f"\n{REAL}")
    # Where the tokenizers are not, their part stays as it is.
    page = gallery() + (of_real_tokenizers() if TOKENIZERS.is_dir() else title + rows)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
