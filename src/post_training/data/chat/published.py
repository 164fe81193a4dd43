"""Templates that others wrote: where their Jinja comes from, their date, and marks for them.

A template may ask for today's date (`strftime_now`). Training text must not differ by day, and the
prompts at inference must be those of the training, so the date is fixed in the template that is
saved with the model: to `data.template_date`, or, where the template has a default, to that.

TRL's package has the templates of many models as they were published, and for some a copy with
generation marks. Such a copy is used where it writes the same text, row by row. Two formats that
TRL does not have are written anew here (jinja/published).
"""

import re
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.config import PUBLISHED_TEMPLATES

_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
_IS_DEFINED = re.compile(r"strftime_now\s+is\s+(?P<negated>not\s+)?defined")


def read_template(name: str | Path, tokenizer: Any) -> str:
    """The Jinja source: of a file, of the tokenizer (`model`), or of a published model by its name.

    Errors: PostTrainingError when there is none.
    """
    where = f"chat template {str(name)!r}"
    if isinstance(name, Path):
        try:
            return name.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise PostTrainingError("the file is not text in UTF-8", where=where) from None
        except OSError as error:
            raise PostTrainingError(f"can't be read: {error.strerror}", where=where) from None
    if name == "model":
        return _of_tokenizer(tokenizer.chat_template, where)
    file = PUBLISHED_TEMPLATES[name]
    if file is None:
        ours = resources.files("post_training.data.chat") / "jinja/published"
        return (ours / f"{name}.jinja").read_text(encoding="utf-8")
    return (_of_trl() / f"{file}.jinja").read_text(encoding="utf-8")


def _of_tokenizer(own: Any, where: str) -> str:
    if isinstance(own, dict) and own:
        raise PostTrainingError(
            f"the tokenizer has several: {', '.join(own)}",
            where=where,
            hint="write the one to train with to a file: data.chat_template: path/to/x.jinja",
        )
    if not isinstance(own, str) or not own:
        raise PostTrainingError("the tokenizer has no chat template", where=where)
    return own


def marked_copies(source: str) -> list[str]:
    """TRL's copies, with generation marks, of a template with exactly this text."""
    folder = _of_trl()
    if not folder.is_dir():
        return []
    copies = []
    for original in sorted(folder.iterdir(), key=lambda path: path.name):
        copy = folder / original.name.replace(".jinja", "_training.jinja")
        if copy.is_file() and original.read_text(encoding="utf-8") == source:
            copies.append(copy.read_text(encoding="utf-8"))
    return copies


def _of_trl() -> Any:
    return resources.files("trl") / "chat_templates"


def asks_for_date(source: str) -> bool:
    """Whether the template can ask for today's date."""
    return "strftime_now" in source


def fix_date(source: str, today: date | None) -> str:
    """The template with a fixed date: `today`, or the default that it has without one.

    Errors: PostTrainingError when its date can't be fixed so; without a place.
    """
    if not asks_for_date(source):
        return source
    if today is not None:
        source = _CALL.sub(lambda call: repr(today.strftime(call["format"])), source)
    defined = today is not None
    source = _IS_DEFINED.sub(lambda found: str(defined != bool(found["negated"])).lower(), source)
    if today is not None and asks_for_date(source):
        raise PostTrainingError("it asks for today's date in a way that can't be fixed")
    return source
