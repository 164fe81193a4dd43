"""`post-training template …`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_training.cli.options import GROUP, Environment, Json, read_date

if TYPE_CHECKING:
    from post_training.data.rows import Conversation

template_app = typer.Typer(help="Examine chat templates.", **GROUP)


@template_app.callback()
def _group() -> None:
    """Keeps `check` a command of its own while there is no other."""


@template_app.command("check")
def template_check(
    template: Annotated[
        str,
        typer.Argument(
            help="A model's or tokenizer's folder, a file, or a name as in data.chat_template.",
            metavar="MODEL|FILE.JINJA|NAME",
        ),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="With a file or a name: the folder of the tokenizer.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="ROWS.JSONL", help="Rows to try, instead of our examples."),
    ] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="How many of them.")] = 100,
    date: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="As data.template_date.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PAGE.HTML", help="Write a page instead.")
    ] = None,
    as_json: Json = False,
    environment: Environment = None,
) -> None:
    """Show what a template can express and what would be trained; exit 1 where it can't be used."""
    import json
    from itertools import islice

    from post_training.cli.edf import enter_image
    from post_training.core.errors import UsageError
    from post_training.core.files import write_atomic

    today = read_date("--date", date)
    is_folder = tokenizer is None
    if is_folder and not Path(template).is_dir():
        raise UsageError(
            f"{template}: no such folder", hint="with a file or a name, give --tokenizer FOLDER"
        )
    enter_image(environment, {"--html": html})
    from rich.console import Console

    from post_training.data.config import find_template
    from post_training.data.inspection.template_check import (
        check_template,
        page_of_report,
        show_report,
    )
    from post_training.models.load import load_tokenizer

    try:
        name = "model" if is_folder else find_template(template)
    except ValueError as error:
        raise UsageError(str(error), where=template) from None
    loaded = load_tokenizer(Path(template) if tokenizer is None else tokenizer)
    rows = [] if data is None else list(islice(_rows(data), num_rows))
    report = check_template(name, loaded, rows, today=today)
    if html is not None:
        write_atomic(html, page_of_report(report))
        print(html)
    elif as_json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        show_report(report, Console())
    raise typer.Exit(0 if report.passed else 1)


def _rows(path: Path) -> "list[tuple[str, Conversation]]":
    """The conversations of a file, by their places.

    Errors: PostTrainingError for a bad row, and for one that is no conversation.
    """
    from post_training.core.errors import PostTrainingError
    from post_training.data.config import DatasetConfig, SourcesConfig
    from post_training.data.reading import Reader, Rejected, open_sources, refusal
    from post_training.data.rows import Conversation

    config = SourcesConfig(datasets=[DatasetConfig(path=path)])
    sources, formats = open_sources(config)
    reader, rejected, found = Reader(config, formats), list[Rejected](), []
    for chunk in sources[0].chunks():
        for record, row in reader.rows(chunk, 0, rejected):
            if not isinstance(row, Conversation):
                raise PostTrainingError("the row is no conversation", where=str(record.place))
            found.append((str(record.place), row))
        if rejected:
            raise refusal(rejected[0].place, rejected[0].bad)
    return found
