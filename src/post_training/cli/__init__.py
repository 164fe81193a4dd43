"""The command line on the host: `post-training …`.

Each module has one typer application a noun (`image …`, `runs …`) and a function a command. A
function imports what it calls when it runs: `--help` must start fast, and imports neither yaml nor
anything of the training stack.
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def main() -> None:
    """Run the command of sys.argv; an error becomes one clear line and the exit code."""
    from post_training.core.errors import Interrupted, report

    arguments = sys.argv[1:]
    # The start of every container: without typer, whose import takes longer than all the rest.
    if arguments[:2] in (["edf", "run"], ["edf", "resolve"]):
        from post_training.cli import edf

        sys.exit(edf.main(arguments[1:]))
    try:
        sys.exit(build_app()(standalone_mode=False))
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        sys.exit(report(_in_our_words(error)))


def _in_our_words(error: BaseException) -> BaseException:
    """Translate what typer raises; any other error is left as it is."""
    import typer

    from post_training.core.errors import UsageError

    if isinstance(error, typer.Abort):
        return KeyboardInterrupt()
    # The base of click's usage errors. Typer has its own copy of click: importing click's would
    # name another class.
    if not isinstance(error, typer.BadParameter.__base__):
        return error
    command = error.ctx.command_path
    problem = error.format_message().rstrip(".")
    if not problem:  # No arguments: the help was shown.
        return SystemExit(UsageError.exit_code)
    return UsageError(problem, where=command, hint=f"{command} --help")


def build_app() -> "typer.Typer":
    """The typer application."""
    import typer

    from post_training.cli import (
        data,
        images,
        imports,
        init,
        jobs,
        machines,
        models,
        options,
        reports,
        runs,
        templates,
    )

    if os.environ.get("NO_COLOR"):
        # Rich leaves out the colours by itself, but not bold and dim.
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None
    app = typer.Typer(
        help="Reproducible post-training of language models, one image digest a run.",
        pretty_exceptions_enable=False,
        **{**options.GROUP, "add_completion": True},
    )
    # In the order of the help.
    groups = {
        "image": images.image_app,
        "edf": images.edf_app,
        "pipeline": jobs.pipeline_app,
        "experiment": jobs.experiment_app,
        "runs": runs.runs_app,
        "artifact": runs.artifact_app,
        "data": data.data_app,
        "model": models.model_app,
        "template": templates.template_app,
        "site": machines.site_app,
        "storage": machines.storage_app,
    }
    for name, group in groups.items():
        app.add_typer(group, name=name)
    app.callback()(options.program_options)
    app.command("init")(init.init_config)
    app.command("submit")(jobs.submit_stage)
    app.command("reproduce")(runs.reproduce_run)
    app.command("report")(reports.report_runs)
    app.command("watch")(reports.watch_runs)
    app.command("import")(imports.import_configuration)
    app.command("settings")(jobs.explain_settings)
    app.command("doctor")(machines.examine_machine)
    return app
