"""A stage whose annotation is slow to nobody: it numbers the words of a prompt. Run in this
process, or in one of its own that is killed at a chosen call."""

import functools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from post_training.annotate import annotate as annotate_module
from post_training.annotate import plan, work
from post_training.annotate.annotate import annotate
from post_training.annotate.config import ChunkedStageConfig
from post_training.annotate.work import Annotator, Row
from post_training.config.model import Role, settings_by_role
from post_training.core.hashing import fingerprint
from post_training.data.branches import BRANCHES, ID, PROMPT, new_branch
from post_training.data.rows import BadRow
from post_training.records.run import RunDescription
from post_training.stages.context import Result, StageContext

# Where a worker can be hit: the functions that write something, or come between two writes.
KILL_POINTS = {
    "the plan's rows are written": (plan, "write_json"),
    "a chunk is annotated": (work._Attempt, "annotate"),
    "a chunk is written": (work, "write_atomic"),
    "a chunk's record is written": (work, "write_json"),
    "a chunk is checked": (annotate_module, "read_chunk_record"),
    "the counts are written": (annotate_module, "write_json"),
}


class CountWords(Annotator):
    """poison: a row with this word in its prompt raises."""

    poison: str = "\0"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        self.calls.append(len(rows))
        if any(self.poison in row[PROMPT]["content"] for row in rows):
            raise RuntimeError("the engine died\nof something")
        self.num_tokens += len(rows)
        return [self.annotated(row) for row in rows]

    def annotated(self, row: Row) -> Row | BadRow:
        words = row[PROMPT]["content"].split()
        if "drop" in words:
            return BadRow("too-long", "has the word drop")
        branch = new_branch(f"{len(words)} words", is_reference=True, metadata={})
        return {**row, BRANCHES: [*row[BRANCHES], branch]}


def write_prompts(path: Path, number: int) -> Path:
    rows = [
        {"question": f"question {n}" + " word" * (n % 7), "answer": f"{n}"} for n in range(number)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(data: Path, **more: Any) -> dict[str, Any]:
    return {"data": {"datasets": [{"path": str(data)}]}, "chunk_rows": 3, **more}


def run(
    config: dict[str, Any],
    run_dir: Path,
    make_annotator: Callable[[], Annotator] = CountWords,
    *,
    config_class: type[ChunkedStageConfig] = ChunkedStageConfig,
    **described: Any,
) -> Result:
    """As execute.py does, without a record."""
    model = config_class.model_validate(config)
    run_dir = model.record_dir(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    roles = settings_by_role(model)
    data = model.data.datasets[0].path
    description = RunDescription(
        stage="count",
        recipe=roles[Role.RECIPE],
        topology={},
        inputs={"data": {"path": str(data), "fingerprint": fingerprint(data)}},
        image=None,
        facts={},
    )
    context = StageContext(run_dir, description=replace(description, **described))
    return annotate(model, context, make_annotator)


_SPAWN = multiprocessing.get_context("spawn")


def start(config: dict[str, Any], run_dir: Path, kill: tuple[str, int, str] | None = None) -> Any:
    """A process that runs it. kill: with SIGKILL, at a point, at its nth call, before or after."""
    process = _SPAWN.Process(target=_run_and_die, args=(config, run_dir, kill))
    process.start()
    return process


def _run_and_die(config: dict[str, Any], run_dir: Path, kill: tuple[str, int, str] | None) -> None:
    if kill is not None:
        point, nth, when = kill
        _kill_at(*KILL_POINTS[point], nth, when)
    run(config, run_dir)


def _kill_at(owner: Any, name: str, nth: int, when: str) -> None:
    original = getattr(owner, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if calls == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def ids(path: Path) -> list[str]:
    return [json.loads(line)[ID] for line in path.read_text().splitlines()]
