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
    from post_training.core.errors import Interrupted, report

    arguments = sys.argv[1:]
    if arguments[:2] in (["edf", "run"], ["edf", "resolve"]):
        from post_training.images import edf_command

        sys.exit(edf_command.main(arguments[1:]))
    try:
        sys.exit(build_app()(standalone_mode=False))
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        sys.exit(report(_in_our_words(error)))


def _in_our_words(error: BaseException) -> BaseException:
    """What typer raises; any other error is left as it is."""
    import typer

    from post_training.core.errors import UsageError

    if isinstance(error, typer.Abort):
        return KeyboardInterrupt()
    # Typer has a copy of click to itself: of its usage errors this is the base.
    if not isinstance(error, typer.BadParameter.__base__):
        return error
    command = error.ctx.command_path
    problem = error.format_message().rstrip(".")
    if not problem:  # Nothing was asked, and the help was shown.
        return SystemExit(UsageError.exit_code)
    return UsageError(problem, where=command, hint=f"{command} --help")


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
