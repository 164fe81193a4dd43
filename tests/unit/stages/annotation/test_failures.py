"""A row that can't be done is found and named; the others live as asked."""

import json
from pathlib import Path

import pytest
from annotation_runs import CountWords, ids, run, settings, write_prompts

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files


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
def test_poison_row_is_isolated_and_every_other_row_is_done(chunk_rows, prompts, tmp_path):
    run(quarantining(prompts, chunk_rows=chunk_rows), tmp_path / "run", Poisoned)
    [reject] = rejects(tmp_path / "run")
    assert (reject["reason"], reject["line"]) == ("failed", 5)
    assert reject["problem"].endswith(": RuntimeError: the engine died")
    assert json.loads(reject["raw"])["initial_prompt"]["content"].startswith("question 4")
    found = ids(tmp_path / "run/dataset/rows.jsonl")
    run(settings(prompts), tmp_path / "healthy")
    healthy = ids(tmp_path / "healthy/dataset/rows.jsonl")
    assert found == [row_id for number, row_id in enumerate(healthy) if number != 4]
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    assert counts == {"num_rows": 19, "num_branches": 38, "rejected": {"failed": 1}}


def test_halving_takes_few_calls(prompts, tmp_path):
    annotators = []

    def make() -> Poisoned:
        annotators.append(Poisoned())
        return annotators[-1]

    run(quarantining(prompts, chunk_rows=16), tmp_path / "run", make)
    assert annotators[0].calls == [16, 8, 4, 4, 2, 1, 1, 2, 8, 4]


def test_poison_row_is_named_where_bad_rows_are_fatal(prompts, tmp_path):
    with pytest.raises(PostTrainingError) as error:
        run(settings(prompts, workers={"index": 0, "count": 1}), tmp_path / "run", Poisoned)
    row_id = ids(tmp_path / "run/chunks/input.jsonl")[4]
    assert f"{row_id}: RuntimeError: the engine died" in str(error.value)
    assert error.value.where == str(tmp_path / "run/chunks/000001.log")
    assert "Traceback" in (tmp_path / "run/chunks/000001.log").read_text()
    run(settings(prompts), tmp_path / "run")  # the fault is gone: the rest is done
    run(settings(prompts), tmp_path / "healthy")
    assert hash_files(tmp_path / "run/dataset") == hash_files(tmp_path / "healthy/dataset")


def test_engine_that_fails_at_everything_ends_the_stage_soon(prompts, tmp_path):
    class Broken(CountWords):
        poison = "question"

    annotator = Broken()
    with pytest.raises(PostTrainingError, match="8 rows failed one after another: RuntimeError"):
        run(quarantining(prompts, chunk_rows=20), tmp_path / "run", lambda: annotator)
    assert len(annotator.calls) < 20
    assert not list((tmp_path / "run/chunks").glob("0*.json"))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7])
def test_engine_that_fails_at_everything_ends_the_stage_whatever_the_chunks(
    chunk_rows, prompts, tmp_path
):
    class Broken(CountWords):
        poison = "question"

    annotator = Broken()
    with pytest.raises(PostTrainingError, match="8 rows failed one after another: RuntimeError"):
        run(quarantining(prompts, chunk_rows=chunk_rows), tmp_path / "run", lambda: annotator)
    assert annotator.calls.count(1) == 8
    assert not (tmp_path / "run/dataset").exists()


def test_rows_that_all_fail_leave_no_dataset(tmp_path):
    class Broken(CountWords):
        poison = "question"

    few = write_prompts(tmp_path / "few.jsonl", 5)
    with pytest.raises(PostTrainingError, match="no row is left: 5 rows left out: 5 failed"):
        run(quarantining(few), tmp_path / "run", Broken)
    assert not (tmp_path / "run/dataset").exists()


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
