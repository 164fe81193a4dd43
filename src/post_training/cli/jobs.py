"""`post-training submit`, `pipeline …` and `experiment …`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from post_training.cli.options import (
    GROUP,
    DryRun,
    Environment,
    JobEnvironment,
    JobSite,
    Json,
    MaxFailures,
    Overrides,
    SchedulerSetting,
)

pipeline_app = typer.Typer(help="Run, submit and watch stages that build on each other.", **GROUP)
experiment_app = typer.Typer(help="Folders of experiments.", **GROUP)

PipelineFile = Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", show_default=False)]
PipelineOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="stages.NAME.config.KEY=VALUE, run_dir=…",
        show_default=False,
    ),
]
Checkout = Annotated[
    Path | None,
    typer.Option("--dev", metavar="CHECKOUT", help="Run this checkout's sources."),
]


def explain_settings(
    stage: Annotated[str, typer.Argument(help="As for entrypoint: sft, prepare, …")],
    key: Annotated[
        str | None,
        typer.Argument(help="Such as training or data.datasets.path.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List a stage's settings; with KEY, say what it and those below it mean."""
    from post_training.config.reference import find_settings, list_settings
    from post_training.stages.registry import describe_settings, find_stage

    if not as_json:
        print("\n".join(describe_settings([stage, *([key] if key else [])])))
        return
    model = find_stage(stage).load_config_class()
    settings = find_settings(model, key) if key else list_settings(model)
    print(json.dumps([setting.as_json() for setting in settings], indent=2))


def submit_stage(
    stage: Annotated[str, typer.Argument(help="As for entrypoint: sft, prepare, …")],
    config: Annotated[Path, typer.Argument(metavar="CFG.YAML", show_default=False)],
    overrides: Overrides = None,
    site: JobSite = "laptop",
    environment: JobEnvironment = "post-training",
    nodes: Annotated[int | None, typer.Option(show_default=False)] = None,
    time: Annotated[
        str | None, typer.Option(help="Wall time of one attempt.", show_default=False)
    ] = None,
    partition: SchedulerSetting = None,
    account: SchedulerSetting = None,
    reservation: SchedulerSetting = None,
    max_failures: MaxFailures = 3,
    dev: Annotated[
        Path | None,
        typer.Option(metavar="CHECKOUT", help="Run a copy of this checkout's sources."),
    ] = None,
    chain: Annotated[
        int,
        typer.Option(min=1, help="Jobs that go on from each other, where none is requeued."),
    ] = 1,
    vet: Annotated[
        bool,
        typer.Option("--vet", help="Look at the nodes first; a bad one is named and left out."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Queue a stage in Slurm; it resumes by itself after wall time, preemption and failures."""
    from post_training.slurm import submit

    changes = {
        "nodes": nodes,
        "time": time,
        "partition": partition,
        "account": account,
        "reservation": reservation,
    }
    request = submit.make_request(
        stage,
        config,
        overrides or [],
        (site, changes),
        environment,
        max_failures=max_failures,
        dev=dev,
        num_chained=chain,
        is_vetted=vet,
    )
    if dry_run:
        print(submit.preview(request), end="")
        return
    job_id = submit.submit(request)
    submit.print_job_and_log(request, job_id)
    print(job_id)


@pipeline_app.command("run")
def pipeline_run(
    file: PipelineFile,
    overrides: PipelineOverrides = None,
    environment: Environment = None,
    dev: Checkout = None,
    unpinned: Annotated[
        bool, typer.Option("--unpinned", help="Without an image; the records say so.")
    ] = False,
) -> None:
    """Run on this machine what is not finished, one stage after another."""
    from post_training.slurm import pipeline_commands

    where = pipeline_commands.Where(environment, dev)
    pipeline_commands.run_pipeline(file, overrides or [], where, unpinned=unpinned)


@pipeline_app.command("submit")
def pipeline_submit(
    file: PipelineFile,
    overrides: PipelineOverrides = None,
    site: JobSite = "laptop",
    environment: JobEnvironment = "post-training",
    partition: SchedulerSetting = None,
    account: SchedulerSetting = None,
    reservation: SchedulerSetting = None,
    max_failures: MaxFailures = 3,
    dev: Checkout = None,
    dry_run: DryRun = False,
) -> None:
    """Queue in Slurm what is not finished, each stage after those it needs."""
    from post_training.slurm import pipeline_commands

    changes = {"partition": partition, "account": account, "reservation": reservation}
    where = pipeline_commands.Where(environment, dev, (site, changes))
    asked = (file, overrides or [], where)
    if dry_run:
        for text in pipeline_commands.preview_pipeline(*asked, max_failures=max_failures):
            print(text)
        return
    print(pipeline_commands.submit_pipeline(*asked, max_failures=max_failures))


@pipeline_app.command("status")
def pipeline_status(
    file_or_folder: Annotated[Path, typer.Argument(metavar="PIPELINE.YAML|FOLDER")],
    as_json: Json = False,
) -> None:
    """Each stage: its state, how far it is, and why it failed."""
    from post_training.cli import tables
    from post_training.slurm.pipeline_commands import read_pipeline_state

    pipeline = read_pipeline_state(file_or_folder)
    if as_json:
        print(json.dumps([{**run, **state.as_json()} for run, state in pipeline.runs], indent=2))
        return
    plan = pipeline.plan
    print(f"{pipeline.folder}  (planned {plan['time']} from {plan['file']})")
    rows = [[run["name"], run["stage"], *tables.cells(state)] for run, state in pipeline.runs]
    print(tables.table(["name", "stage", *tables.HEADER], rows))


@experiment_app.command("check")
def experiment_check(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With pipeline.yaml and expected.json.")
    ],
    environment: Environment = None,
    dev: Checkout = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where; one that was begun is gone on with.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Make what comes out the expected.")
    ] = False,
) -> None:
    """Run an experiment again: exit 0 identical, 3 equivalent figures, 4 differs."""
    from post_training.reproduce.experiment import check_experiment
    from post_training.slurm.pipeline_commands import Where

    where = Where(environment, dev)
    code, answer = check_experiment(folder, run_dir, where, write=write)
    print(answer)
    sys.exit(code)


@experiment_app.command("new")
def experiment_new(
    name: Annotated[str, typer.Argument(help="Small letters, digits and hyphens.")],
    parent: Annotated[Path, typer.Option(help="Where its folder is made.")] = Path(
        "reproducibility"
    ),
) -> None:
    """Make a folder with a pipeline that runs, and a page to be filled in."""
    from post_training.slurm.pipeline_commands import new_experiment

    print(new_experiment(name, parent))
