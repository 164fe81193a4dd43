"""The command line on the host: `post-training …`.

Each module here has the commands of a few words, and imports what they do inside them: `--help`
imports neither pydantic nor anything of the stack.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Errors become one clear line and the exit code."""
    from post_training.core.errors import report

    arguments = sys.argv[1:]
    if arguments[:2] in (["edf", "run"], ["edf", "resolve"]):
        from post_training.images import edf_command

        sys.exit(edf_command.main(arguments[1:]))
    try:
        build_app()()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(report(error))


def build_app() -> "typer.Typer":
    """The typer application."""
    import typer

    from post_training.cli import data, images, jobs, machines, runs
    from post_training.cli.options import GROUP

    app = typer.Typer(
        help="Reproducible post-training of language models, one image digest a run.",
        pretty_exceptions_enable=False,
        **GROUP,
    )
    for module in (images, jobs, runs, data, machines):
        module.add_commands(app)
    return app
