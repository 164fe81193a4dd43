"""A bad row is left out as asked; a failure of the engine or the model is never a row's fault."""

import errno
import json
from pathlib import Path

import pytest

from helpers.annotation_runs import CountWords, ids, run, settings, write_prompts
from post_training.annotate.config import ChunkedStageConfig
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.data.rows import BadRow


class Poisoned(CountWords):
    """A row kills the engine, which then has to be started anew."""

    poison = "question 4"

    def __init__(self) -> None:
        super().__init__()
        self.is_alive = True

    def __call__(self, rows):
        assert self.is_alive, "called after an exception without recovery"
        self.is_alive = False
        result = super().__call__(rows)
        self.is_alive = True
        return result

    def recover(self) -> None:
        self.is_alive = True


def quarantining(prompts: Path, **more) -> dict:
    config = settings(prompts, **more)
    config["data"] |= {"on_error": "quarantine"}
    return config


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 20)


def rejects(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("chunk_rows", [1, 3, 20])
def test_failure_of_the_engine_is_no_fault_of_the_row_it_is_named_at(chunk_rows, prompts, tmp_path):
    with pytest.raises(PostTrainingError) as error:
        run(quarantining(prompts, chunk_rows=chunk_rows), tmp_path / "run", Poisoned)
    row_id = ids(tmp_path / "run/chunks/input.jsonl")[4]
    assert f"failed at row {row_id}: RuntimeError: the engine died" in str(error.value)
    assert "data.on_error does not leave it out" in error.value.hint
    log = tmp_path / f"run/chunks/{4 // chunk_rows:06}.log"
    assert error.value.where == str(log)
    assert "Traceback" in log.read_text()
    assert not (tmp_path / "run/dataset").exists()
    run(quarantining(prompts, chunk_rows=chunk_rows), tmp_path / "run")  # the fault is gone
    run(settings(prompts), tmp_path / "healthy")
    done, healthy = (tmp_path / name / "dataset/rows.jsonl" for name in ("run", "healthy"))
    assert done.read_bytes() == healthy.read_bytes()


@pytest.mark.parametrize("chunk_rows", [1, 3, 20])
def test_row_at_which_the_engine_failed_is_left_out_where_that_is_asked_for(
    chunk_rows, prompts, tmp_path
):
    config = quarantining(prompts, chunk_rows=chunk_rows, max_failed_rows=1)
    run(config, tmp_path / "run", Poisoned)
    [reject] = rejects(tmp_path / "run")
    assert (reject["reason"], reject["line"]) == ("failed", 5)
    assert reject["problem"].endswith(": RuntimeError: the engine died")
    assert json.loads(reject["raw"])["initial_prompt"]["content"].startswith("question 4")
    found = ids(tmp_path / "run/dataset/rows.jsonl")
    run(settings(prompts), tmp_path / "healthy")
    healthy = ids(tmp_path / "healthy/dataset/rows.jsonl")
    assert found == [row_id for number, row_id in enumerate(healthy) if number != 4]
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    del counts["sources"]
    assert counts == {"num_rows": 19, "num_branches": 38, "rejected": {"failed": 1}}


def test_leaving_rows_out_is_refused_where_bad_rows_are_fatal(prompts):
    with pytest.raises(
        ValueError, match=r"max_failed_rows: leaves rows out, and data\.on_error is"
    ):
        ChunkedStageConfig.model_validate(settings(prompts, max_failed_rows=1))


def test_halving_takes_few_calls(prompts, tmp_path):
    annotators = []

    def make() -> Poisoned:
        annotators.append(Poisoned())
        return annotators[-1]

    config = quarantining(prompts, chunk_rows=16, max_failed_rows=1)
    run(config, tmp_path / "run", make)
    assert annotators[0].calls == [16, 8, 4, 4, 2, 1, 1, 2, 8, 4]


@pytest.mark.parametrize("chunk_rows", [1, 3, 20])
@pytest.mark.parametrize("most", [0, 2])
def test_engine_that_fails_at_everything_ends_the_stage_soon(most, chunk_rows, prompts, tmp_path):
    class Broken(CountWords):
        poison = "question"

    annotator = Broken()
    config = quarantining(prompts, chunk_rows=chunk_rows, max_failed_rows=most)
    with pytest.raises(PostTrainingError, match=r"failed at row .*: RuntimeError") as error:
        run(config, tmp_path / "run", lambda: annotator)
    assert f"max_failed_rows: {most + 1} does" in error.value.hint
    assert annotator.calls.count(1) == most + 1
    assert not (tmp_path / "run/dataset").exists()


def test_file_system_that_is_lost_ends_the_stage_as_what_it_is(prompts, tmp_path):
    class Lost(CountWords):
        def __call__(self, rows):
            raise OSError(errno.ESTALE, "stale file handle")

    annotator = Lost()
    with pytest.raises(OSError, match="stale file handle"):  # slurm/outcome.py tries it again
        run(quarantining(prompts), tmp_path / "run", lambda: annotator)


def test_rows_that_are_all_bad_leave_no_dataset(tmp_path):
    class Refusing(CountWords):
        def annotated(self, row):
            return BadRow("empty", "says nothing")

    few = write_prompts(tmp_path / "few.jsonl", 5)
    with pytest.raises(PostTrainingError, match="no row is left: 5 rows left out: 5 empty"):
        run(quarantining(few), tmp_path / "run", Refusing)
    assert not (tmp_path / "run/dataset").exists()


def test_bad_row_is_named_where_bad_rows_are_fatal(prompts, tmp_path):
    class Refusing(CountWords):
        def annotated(self, row):
            bad = row["initial_prompt"]["content"].startswith("question 4")
            return BadRow("empty", "says nothing") if bad else super().annotated(row)

    with pytest.raises(PostTrainingError, match="says nothing") as error:
        run(settings(prompts), tmp_path / "run", Refusing)
    assert ids(tmp_path / "run/chunks/input.jsonl")[4] in str(error.value)
    assert error.value.where == "chunk 1"


class FailsInChunks(CountWords):
    """At the chunks that begin with these prompts."""

    def __call__(self, rows):
        if rows[0]["initial_prompt"]["content"].startswith(("question 3 ", "question 9 ")):
            raise PostTrainingError("the disk of the engine is full")
        return super().__call__(rows)


def test_failed_chunks_are_counted_and_the_others_done_as_far_as_asked(prompts, tmp_path):
    with pytest.raises(PostTrainingError, match="the disk of the engine is full"):
        run(settings(prompts), tmp_path / "one", FailsInChunks)
    assert sorted(path.name for path in (tmp_path / "one/chunks").glob("0*.jsonl")) == [
        "000000.jsonl"
    ]
    config = settings(prompts, max_failed_chunks=2)
    with pytest.raises(PostTrainingError, match="chunks that failed: 1, 3; chunk 1: the disk"):
        run(config, tmp_path / "two", FailsInChunks)
    assert len(list((tmp_path / "two/chunks").glob("0*.jsonl"))) == 5
    run(config, tmp_path / "two")
    run(settings(prompts), tmp_path / "healthy")
    assert hash_files(tmp_path / "two/dataset") == hash_files(tmp_path / "healthy/dataset")


def test_rows_meant_to_be_left_out_are_no_failure(prompts, tmp_path):
    prompts.write_text(prompts.read_text().replace("question 7", "drop 7"))
    result = run(settings(prompts), tmp_path / "run")
    assert (result.metrics["num_rows"], result.metrics["num_rejected"]) == (19, 1)
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts["rejected"] == {"too-long": 1}
