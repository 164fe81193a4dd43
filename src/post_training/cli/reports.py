"""`post-training report` and `post-training watch`: runs as pages for a browser."""

from pathlib import Path
from typing import Annotated

import typer


def report_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN…", help="Run folders or ids; several share their charts."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The page. By default RUN/report.html; of several runs, ./report.html.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write one page of HTML with the curves, data, settings, identity and lineage of runs."""
    from post_training.core.errors import UsageError
    from post_training.report.page import write_page
    from post_training.report.view import PAGE, WHOLE_BYTES, read_view
    from post_training.slurm.run_index import find_run
    from post_training.slurm.runs import run_states
    from post_training.stages.registry import find_config_class

    run_dirs = [find_run(run) for run in runs]
    if len({run_dir.resolve() for run_dir in run_dirs}) < len(run_dirs):
        raise UsageError("a run is named twice", where="report")
    for run_dir in run_dirs:  # Before Slurm is asked.
        read_view(run_dir, find_config_class, most_bytes=0)
    views = [
        read_view(state.run_dir, find_config_class, state=state.state, most_bytes=WHOLE_BYTES)
        for state in run_states(run_dirs)
    ]
    target = output or (run_dirs[0] / PAGE if len(run_dirs) == 1 else Path(PAGE))
    write_page(views, target)
    print(target)


def watch_runs(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder with runs.")
    ] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port.")] = 8765,
    every: Annotated[int, typer.Option(min=1, help="Seconds between updates.")] = 10,
) -> None:
    """Serve the pages of runs on this machine, only for you; the pages follow the runs."""
    from post_training.slurm.run_index import find_run
    from post_training.slurm.watch import serve

    serve(folder if folder.is_dir() else find_run(folder), port=port, refresh_s=every)
