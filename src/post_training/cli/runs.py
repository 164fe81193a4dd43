"""`post-training runs …`, `artifact …` and `reproduce`."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from post_training.cli.options import (
    GROUP,
    Artifact,
    Environment,
    Json,
    Repository,
    Run,
    Store,
    read_date,
)

if TYPE_CHECKING:
    from post_training.records.card import CardDetails

runs_app = typer.Typer(help="Look at runs.", **GROUP)
artifact_app = typer.Typer(help="Look at what runs made, check and publish it.", **GROUP)

# Of a card.
Base = Annotated[
    str | None,
    typer.Option("--base-model", help="The base model's name on the hub.", show_default=False),
]
Licence = Annotated[
    str | None, typer.Option("--license", help="apache-2.0, llama3.1, …", show_default=False)
]
SourceLicences = Annotated[
    list[str] | None,
    typer.Option("--source-license", metavar="NAME=LICENCE", help="Of a source of the data."),
]


@runs_app.command("show")
def runs_show(
    run: Run,
    as_json: Json = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file; exit 1 if one was changed.")
    ] = False,
) -> None:
    """What a run was, in which image, from what, and what came out."""
    from post_training.cli import show
    from post_training.slurm.run_index import find_run
    from post_training.slurm.runs import run_states

    run_dir = find_run(run)
    [state] = run_states([run_dir])
    sys.exit(show.show_run(run_dir, state.state, as_json=as_json, verify=verify))


@runs_app.command("diff")
def runs_diff(
    run: Run,
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER…", help="Others, each beside the first.")
    ],
    as_json: Json = False,
) -> None:
    """Every setting that differs, and where the outcomes part: exit 0 the same, 4 different."""
    from post_training.cli import show
    from post_training.slurm.run_index import find_run

    sys.exit(show.show_diffs([find_run(each) for each in (run, *others)], as_json=as_json))


@runs_app.command("list")
def runs_list(
    folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"),
    stage: Annotated[str | None, typer.Option(help="sft, dpo, …", show_default=False)] = None,
    state: Annotated[
        str | None, typer.Option(help="finished, running, failed, …", show_default=False)
    ] = None,
    image: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="How it begins.", show_default=False)
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="Started on this day or later, in UTC."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the recipe.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs below a folder: state, progress, loss, speed, time left, and why they ended."""
    from post_training.cli import tables
    from post_training.config.load import parse_override
    from post_training.core.errors import dotted
    from post_training.slurm import run_index
    from post_training.stages.registry import find_stage

    if stage is not None:
        find_stage(stage)
    overrides = map(parse_override, where or [])
    settings = {dotted(override.path): override.value for override in overrides}
    filters = run_index.Filters(stage, state, image, read_date("--since", since), settings)
    states = run_index.list_states(folder, filters)
    if as_json:
        print(json.dumps([state.as_json() for state in states], indent=2))
        return
    rows = [[str(state.run_dir), state.stage or "", *tables.cells(state)] for state in states]
    print(tables.table(["run", "stage", *tables.HEADER], rows))


@runs_app.command("logs")
def runs_logs(
    run: Run,
    worker: Annotated[
        int | None, typer.Option(help="Of this worker of an array.", show_default=False)
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The last ones.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
) -> None:
    """What a run's job printed, with all its attempts."""
    from post_training.slurm import run_commands, run_index

    path = run_commands.find_log(run_index.find_run(run), worker=worker, may_come=follow)
    print(f"==> {path}", file=sys.stderr, flush=True)
    following = ["--follow=name", "--retry"] if follow else []
    os.execvp("tail", ["tail", f"--lines={lines}", *following, str(path)])


@runs_app.command("cancel")
def runs_cancel(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER…", help="Runs, or folders of runs.")
    ],
) -> None:
    """Stop the jobs of runs for good; a pipeline's folder stops all of it."""
    from post_training.slurm import run_commands

    for run_dir, job_ids in run_commands.cancel_runs(folders).items():
        print(f"cancelled {', '.join(job_ids)}: {run_dir}", file=sys.stderr)


@runs_app.command("export")
def runs_export(
    run: Run,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="RUN_ID.zip", show_default=False)
    ] = None,
    with_data: Annotated[
        bool,
        typer.Option("--with-data", help="Recorded files up to 1 MiB too: rows, samples."),
    ] = False,
) -> None:
    """Pack the record and its figures into an archive, an RO-Crate, with in-toto provenance."""
    from post_training.records import export
    from post_training.slurm.run_index import find_run

    print(export.export_run(find_run(run), output, with_data=with_data))


@runs_app.command("sync")
def runs_sync(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders or ids of runs that have ended.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="wandb|mlflow|tensorboard", help="Where to.")],
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="For TensorBoard, and W&B offline.")
    ] = Path("synced"),
    project: Annotated[
        str | None,
        typer.Option(help="W&B's project or MLflow's experiment.", show_default="the run's own"),
    ] = None,
    environment: Environment = None,
) -> None:
    """Show runs in W&B, MLflow or TensorBoard after the fact; each once, however often."""
    from importlib.util import find_spec

    from post_training.cli import edf
    from post_training.core.errors import UsageError
    from post_training.images.identity import can_run_here
    from post_training.slurm.run_index import find_run
    from post_training.train import sync

    if to not in sync.PACKAGES:
        raise UsageError(f"--to: must be one of {', '.join(sync.PACKAGES)} (got {to})")
    run_dirs = [find_run(run) for run in runs]
    is_here = environment is None and find_spec(sync.PACKAGES[to]) is not None
    if not is_here and not can_run_here(environment):
        words = ["runs", "sync", *map(str, run_dirs), "--to", to, "--output", str(folder)]
        words += [] if project is None else ["--project", project]
        edf.enter_image(environment, {"--output": folder}, words)
    if find_spec(sync.PACKAGES[to]) is None:
        raise UsageError(
            f"--to {to}: the package {sync.PACKAGES[to]} is not installed here",
            hint="`pip install mlflow-skinny` beside post-training" if to == "mlflow" else None,
        )
    for line in sync.sync_runs(run_dirs, to, folder, project):
        print(line)


@artifact_app.command("show")
def artifact_show(folder: Artifact, as_json: Json = False) -> None:
    """What it is, and which run made it."""
    from post_training.cli import show

    show.show_artifact(folder, as_json=as_json)


@artifact_app.command("lineage")
def artifact_lineage(folder: Artifact, as_json: Json = False) -> None:
    """All it came from: runs, models, data, as a tree."""
    from post_training.cli import show

    show.show_lineage(folder, as_json=as_json)


@artifact_app.command("verify")
def artifact_verify(folder: Artifact) -> None:
    """Hash its files again: ok, or the files that are not what they were."""
    from post_training.cli import show

    show.verify_artifact(folder)


@artifact_app.command("card")
def artifact_card(
    folder: Artifact,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="README.md", show_default="stdout")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The card's title.", show_default=False)] = None,
    base: Base = None,
    licence: Licence = None,
    source_licences: SourceLicences = None,
) -> None:
    """Write a model's card from its record: base, data, settings, figures, lineage, digest."""
    from post_training.core.errors import UsageError
    from post_training.core.files import write_atomic
    from post_training.records.card import write_card

    details = _card_details(name or folder.absolute().name, base, licence, source_licences)
    text = write_card(folder, details)
    if output is None:
        print(text, end="")
        return
    if output.resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            "--output: must be outside of the artifact, which stays as its run left it",
            hint="`artifact publish` puts the card among the files that it uploads",
        )
    write_atomic(output, text)
    print(output)


@artifact_app.command("publish")
def artifact_publish(
    folder: Artifact,
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="On the hub.")],
    yes: Annotated[
        bool, typer.Option("--yes", help="Upload; else only say what would be.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="If the repository is new: everybody may read it.")
    ] = False,
    card: Annotated[
        Path | None, typer.Option(help="A card of your own.", show_default=False)
    ] = None,
    base: Base = None,
    licence: Licence = None,
    source_licences: SourceLicences = None,
    environment: Environment = None,
) -> None:
    """Upload a model and its card to the Hugging Face hub; says first what it would do."""
    from post_training.cli.edf import enter_image
    from post_training.core.errors import UsageError, tell
    from post_training.models.publish import Publication
    from post_training.records.card import write_card

    own = {"--base-model": base, "--license": licence, "--source-license": source_licences}
    if card is not None and (given := [option for option, value in own.items() if value]):
        raise UsageError("not with --card: write it into your card", where=", ".join(given))
    if yes:
        enter_image(environment, {"FOLDER": folder})
    if card is None:
        details = _card_details(repository.rpartition("/")[2], base, licence, source_licences)
        text = write_card(folder, details)
    else:
        text = _read_card(card)
    publication = Publication.prepare(folder, repository, text)
    for line in publication.lines():
        print(line)
    if not yes:
        tell(f"nothing was uploaded; --yes does, to a {_READERS[public]} repository if it is new")
        return
    print(publication.upload(private=not public))


_READERS = {True: "public", False: "private"}


def _read_card(path: Path) -> str:
    from post_training.core.errors import UsageError

    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "is no text"
        raise UsageError(f"--card: {problem.lower()}", where=str(path)) from None


def _card_details(
    name: str, base: str | None, licence: str | None, source_licences: list[str] | None
) -> "CardDetails":
    from post_training.core.errors import UsageError
    from post_training.records.card import CardDetails

    pairs = [each.rpartition("=") for each in source_licences or []]
    if wrong := [
        each
        for each, (source, _, its) in zip(source_licences or [], pairs, strict=True)
        if not (source and its)
    ]:
        raise UsageError(f"--source-license: must be NAME=LICENCE (got {wrong[0]})")
    return CardDetails(name, base, licence, {source: its for source, _, its in pairs})


def reproduce_run(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run's folder or id, or an artifact it made."),
    ],
    run_dir: Annotated[Path | None, typer.Option(help="Where to run again.")] = None,
    store: Store = None,
    repository: Repository = Path("."),
    upstream: Annotated[
        bool, typer.Option("--upstream", help="Everything its inputs came from, too.")
    ] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="What made inputs that are gone or changed, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is missing, and run nothing.")
    ] = False,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Relative, of the figures, on another machine.")
    ] = 0.01,
    site: Annotated[
        str | None, typer.Option(help="Run it as a job there.", show_default=False)
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Of the job.", show_default="what its ranks fill")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Of the job.", show_default=False)] = None,
) -> None:
    """Run again from the recorded image digest and compare.

    Exit code 0: identical; 3: equivalent, on another machine; 4: differs."""
    from post_training.core.errors import UsageError
    from post_training.reproduce import plan, verdict
    from post_training.slurm.run_index import find_run
    from post_training.slurm.site import load_site

    if site is None and (nodes, time) != (None, None):
        raise UsageError("--nodes and --time: of a job, so only with --site")
    where = site and (site, load_site(site, {"time": time}))
    runs = "all" if upstream else "stale" if stale else "none"
    options = plan.Options(
        new_dir=run_dir,
        store=store,
        upstream=runs,
        dry_run=dry_run,
        tolerance=tolerance,
        site=where,
        nodes=nodes,
        repository=repository,
    )
    code, answer = verdict.reproduce(find_run(run), options)
    print(answer)
    sys.exit(code)
