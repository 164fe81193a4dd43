"""MLflow: a run there for a run here, found again by the tag `post_training.run_id`.

    MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN, …   as MLflow documents them

By its own client, so that a server, a database and a folder (`./mlruns`) all work. MLflow keeps
each value that it is told, so only those are told that it has not got. It is in no image of ours:
`pip install mlflow-skinny` beside the command line.
"""

import json
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.records.run_record import CONFIG_NAME, RECORD_NAME
from post_training.train.reporters import Line, scalars

_URI = "MLFLOW_TRACKING_URI"
_TAG = "post_training.run_id"
# MLflow's limits: of a request, and of a parameter's value and a tag's.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_LONGEST_VALUE = 5000
_STATES = {"finished": "FINISHED", "failed": "FAILED"}


def show_in_mlflow(
    run_dir: Path,
    record: dict[str, Any],
    lines: Sequence[Line],
    *,
    settings: dict[str, Any],
    facts: dict[str, Any],
    figures: dict[str, float],
    experiment: str,
    name: str,
) -> str:
    """Show the run, or what is new of it; where it is.

    Errors: UsageError where nobody said which MLflow; PostTrainingError for what MLflow says.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Param, RunTag
    from mlflow.exceptions import MlflowException

    if not os.environ.get(_URI):
        hint = "a server's address; or file:./mlruns, with MLFLOW_ALLOW_FILE_STORE=true"
        raise UsageError(f"{_URI} is not set", where="mlflow", hint=hint)
    try:
        client = MlflowClient()
        experiment_id = _experiment(client, experiment)
        started = _milliseconds(record["attempts"][0]["started"])
        run = _find_run(client, experiment_id, record["run_id"])
        if run is None:
            tags = {_TAG: record["run_id"]}
            run = client.create_run(experiment_id, started, tags, run_name=name)
        own = run.info.run_id
        last = lines[-1]["step"] if lines else 0
        ended = _milliseconds(record["attempts"][-1]["ended"]) or started
        metrics = [
            *_metrics(lines),
            *((name, value, ended, last) for name, value in figures.items()),
        ]
        _log_new(client, own, metrics)
        params = [
            Param(key, _text(value))
            for key, value in settings.items()
            if key not in run.data.params
        ]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(own, params=params[start : start + _PARAMS_AT_ONCE])
        tags = [RunTag(f"post_training.{key}", _text(value)) for key, value in facts.items()]
        client.log_batch(own, tags=tags)
        for file in (RECORD_NAME, CONFIG_NAME):
            if (run_dir / file).exists():
                client.log_artifact(own, str(run_dir / file))
        client.set_terminated(own, _STATES.get(record["status"], "KILLED"), ended)
    except MlflowException as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise PostTrainingError(f"MLflow: {problem}", where=str(run_dir)) from None
    return f"experiment {experiment}, run {own}"


def _experiment(client: Any, name: str) -> str:
    found = client.get_experiment_by_name(name)
    return client.create_experiment(name) if found is None else found.experiment_id


def _find_run(client: Any, experiment_id: str, run_id: str) -> Any:
    found = client.search_runs([experiment_id], f"tags.`{_TAG}` = '{run_id}'", max_results=1)
    return client.get_run(found[0].info.run_id) if found else None


def _metrics(lines: Sequence[Line]) -> Iterator[tuple[str, float, int, int]]:
    """(name, value, milliseconds, step)."""
    for line in lines:
        written_at = _milliseconds(line["timing"]["time"]) or 0
        for name, value in scalars(line).items():
            yield name, float(value), written_at, line["step"]


def _log_new(client: Any, own: str, metrics: list[tuple[str, float, int, int]]) -> None:
    """Of each name, the steps that MLflow has not got: it would keep a second value beside the
    first."""
    from mlflow.entities import Metric

    there = {
        name: {each.step for each in client.get_metric_history(own, name)}
        for name in dict.fromkeys(name for name, *_ in metrics)
    }
    new = [Metric(*each) for each in metrics if each[3] not in there[each[0]]]
    for start in range(0, len(new), _METRICS_AT_ONCE):
        client.log_batch(own, metrics=new[start : start + _METRICS_AT_ONCE])


def _milliseconds(time: str | None) -> int | None:
    return None if time is None else int(datetime.fromisoformat(time).timestamp() * 1000)


def _text(value: Any) -> str:
    """A longer one is cut, and says so: MLflow refuses it. run.json, which goes along, has all."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST_VALUE:
        return text
    return text[: _LONGEST_VALUE - 30] + "… (cut; run.json has all)"
