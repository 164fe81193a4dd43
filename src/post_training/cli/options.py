"""Options and arguments that several commands have."""

from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from post_training.core.errors import UsageError

GROUP: dict[str, Any] = {"no_args_is_help": True, "add_completion": False}


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"post-training {version('post-training')}")
        raise typer.Exit


def program_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say which version this is.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Reproducible post-training of language models, one image digest a run."""


def read_date(option: str, given: str | None) -> date | None:
    """Errors: UsageError for what is no date."""
    try:
        return None if given is None else date.fromisoformat(given)
    except ValueError:
        raise UsageError(f"{option}: must be a date such as 2026-01-31 (got {given!r})") from None


Store = Annotated[Path | None, typer.Option(help="The image store.", show_default=False)]
Repository = Annotated[Path, typer.Option(help="The checkout of post-training.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or its id.")]
Artifact = Annotated[Path, typer.Argument(metavar="FOLDER", help="With artifact.json.")]
SiteName = Annotated[str, typer.Option(help="laptop, clariden, … or one of your own")]
Environment = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="The EDF to run in; post-training where the stack is not installed.",
        show_default=False,
    ),
]
# Of jobs.
JobSite = Annotated[str, typer.Option(help="How jobs are run: laptop, clariden, …")]
JobEnvironment = Annotated[str, typer.Option(metavar="NAME|FILE", help="The EDF of the image.")]
SchedulerSetting = Annotated[str | None, typer.Option(show_default=False)]
MaxFailures = Annotated[int, typer.Option(min=0, help="Failures in a row that may be tried again.")]
DryRun = Annotated[bool, typer.Option(help="Print what would be submitted.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False),
]
