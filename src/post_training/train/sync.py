"""Show runs that have ended in W&B, MLflow or TensorBoard, from what is in their folders.

A run there stands for a run here, of the same id, however often it was started again and however
often it is shown. It gets

    metrics.jsonl       as training would have reported it (reporters.py)
    config.yaml         recipe and topology, by their dotted keys
    run.json            identity, image, commit, inputs with the runs that made them, attempts,
                        artifacts, final figures
    reproduction.json   verdicts: of the runs beside it that repeated it, and its own
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.records.run import is_live
from post_training.records.run_record import (
    METRICS_NAME,
    read_verdicts,
    read_whole_record,
    record_faults,
)
from post_training.train.reporters import Line
from post_training.train.training_config import LoggingConfig

Service = Literal["wandb", "mlflow", "tensorboard"]
# The package of each; MLflow's is in no image of ours.
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "tensorboard": "tensorboard"}
_REPORTS = ("wandb_entity", "wandb_project", "wandb_run_name", "wandb_group", "wandb_tags")


@dataclass(frozen=True)
class EndedRun:
    """settings: {dotted key: value}. facts: what else is known of it. figures: at its end."""

    run_dir: Path
    record: dict[str, Any]
    lines: list[Line]
    settings: dict[str, Any]
    facts: dict[str, Any]
    figures: dict[str, float]

    @classmethod
    def read(cls, run_dir: Path) -> "EndedRun":
        """Errors: UsageError for what is no run, or one that goes on."""
        record = read_whole_record(run_dir)
        if is_live(run_dir):
            hint = "logging.report_to shows a run while it goes on"
            raise UsageError("the run is live", where=str(run_dir), hint=hint)
        for fault in record_faults(record):
            tell(f"warning: {run_dir}: run.json {fault}")
        return cls(
            run_dir,
            record,
            _read_lines(run_dir / METRICS_NAME),
            {**record["recipe"], **record["topology"]},
            _facts(run_dir, record),
            _numbers(record["metrics"]),
        )

    @property
    def run_id(self) -> str:
        return self.record["run_id"]

    @property
    def has_failed(self) -> bool:
        return self.record["status"] != "finished"

    def logging(self, project: str | None) -> LoggingConfig:
        """The run's own team, project, name, group and tags, where its stage has such settings."""
        placement = self.record["placement"]
        own = {name: placement.get(f"logging.{name}") for name in _REPORTS}
        own["wandb_run_name"] = own["wandb_run_name"] or self.run_dir.absolute().name
        if project is not None:
            own["wandb_project"] = project
        return LoggingConfig(**{name: value for name, value in own.items() if value is not None})


def sync_runs(
    run_dirs: Sequence[Path], service: Service, folder: Path, project: str | None
) -> list[str]:
    """Show these runs there; a line for each, which says where.

    folder: for TensorBoard's files, and W&B's of a run that is offline: FOLDER/RUN_ID.
    project: instead of the runs' own (W&B's project, MLflow's experiment).
    Errors: UsageError for what can't be shown, before anything is; PostTrainingError when the
    service fails.
    """
    if service == "tensorboard" and project is not None:
        raise UsageError("--project: TensorBoard has no projects")
    runs = [EndedRun.read(run_dir) for run_dir in run_dirs]
    if nothing := next((run for run in runs if not run.lines and not run.figures), None):
        raise UsageError("no metrics: there is nothing to show", where=str(nothing.run_dir))
    show = {"wandb": _to_wandb, "mlflow": _to_mlflow, "tensorboard": _to_tensorboard}[service]
    return [f"{run.run_id}: {show(run, folder / run.run_id, project)}" for run in runs]


def _to_wandb(run: EndedRun, folder: Path, project: str | None) -> str:
    import wandb

    from post_training.train.weights_and_biases import WeightsAndBiases

    folder.mkdir(parents=True, exist_ok=True)
    reporter = WeightsAndBiases(run.logging(project), folder, run.run_id, run.settings, tell)
    try:
        reporter.start(run.lines)
        reporter.describe(run.facts, run.figures)
        place = reporter.place
        reporter.close(failed=run.has_failed)
    except (wandb.Error, OSError) as error:
        raise PostTrainingError(f"W&B: {_first_line(error)}", where=str(run.run_dir)) from None
    return place


def _to_tensorboard(run: EndedRun, folder: Path, project: str | None) -> str:
    from post_training.train.tensorboard import TensorBoard

    folder.parent.mkdir(parents=True, exist_ok=True)
    reporter = TensorBoard(folder)
    reporter.start(run.lines)
    last = run.lines[-1]["step"] if run.lines else 0
    reporter.describe(run.settings, run.facts, run.figures, step=last)
    reporter.close(failed=run.has_failed)
    return f"tensorboard --logdir {folder.parent}"


def _to_mlflow(run: EndedRun, folder: Path, project: str | None) -> str:
    from post_training.train.mlflow import show_in_mlflow

    config = run.logging(project)
    try:
        return show_in_mlflow(
            run.run_dir,
            run.record,
            run.lines,
            settings=run.settings,
            facts=run.facts,
            figures=run.figures,
            experiment=config.wandb_project,
            name=config.wandb_run_name or run.run_id,
        )
    except OSError as error:
        raise PostTrainingError(f"MLflow: {_first_line(error)}", where=str(run.run_dir)) from None


def _read_lines(path: Path) -> list[Line]:
    """Of a stage that trains; none of any other."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UsageError(f"a line is no JSON: {error}", where=str(path)) from None


def _facts(run_dir: Path, record: dict[str, Any]) -> dict[str, Any]:
    outputs = record["outputs"] or {"artifacts": {}}
    facts = {
        **{name: record[name] for name in ("run_id", "stage", "status", "identity", "recipe_hash")},
        "image": record["image"]["oci_digest"] if record["image"] else "unpinned",
        "commit": record["code"].get("commit"),
        "attempts": len(record["attempts"]),
        "inputs": {key: _origin(value) for key, value in record["inputs"].items()},
        "artifacts": {kind: made["fingerprint"] for kind, made in outputs["artifacts"].items()},
    }
    return facts | {"verdicts": [str(each) for each in read_verdicts(run_dir, record["run_id"])]}


def _origin(value: dict[str, Any]) -> dict[str, Any]:
    """Of an input: what it is, and the runs it comes from, as far up as is known."""
    origin: dict[str, Any] = {"fingerprint": value["fingerprint"]}
    if made_by := value.get("made_by"):
        origin["made_by"] = {
            **{name: made_by[name] for name in ("run_id", "stage", "lineage_hash")},
            "inputs": {key: _origin(each) for key, each in made_by["inputs"].items()},
        }
    return origin


def _numbers(metrics: dict[str, Any], prefix: str = "final") -> dict[str, float]:
    """{"final/loss": 2.1, "final/timing/step_s": 0.5}."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float):
            found[f"{prefix}/{name}"] = value
    return found


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
