"""The merged rows have the same bytes for any workers and kills; what was changed is found."""

import json
import random
from pathlib import Path
from typing import ClassVar

import pytest

from helpers.annotation_runs import (
    KILL_POINTS,
    CountWords,
    ids,
    run,
    settings,
    start,
    write_prompts,
)
from post_training.annotate import annotate as merge
from post_training.annotate.config import ChunkedStageConfig
from post_training.annotate.work import WorkerPlace
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.data.branches import PROMPT


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl", 20)


@pytest.fixture
def expected(prompts: Path, tmp_path: Path) -> dict[str, str]:
    run(settings(prompts), tmp_path / "expected")
    return hash_files(tmp_path / "expected/dataset")


def test_annotate_adds_a_branch_to_each_row_in_order(prompts, tmp_path):
    result = run(settings(prompts), tmp_path / "run")
    assert result.artifacts == {"dataset": "dataset"}
    assert (result.metrics["num_rows"], result.metrics["num_rejected"]) == (20, 0)
    rows = [json.loads(x) for x in (tmp_path / "run/dataset/rows.jsonl").read_text().splitlines()]
    assert [row[PROMPT]["content"].split()[1] for row in rows] == [str(n) for n in range(20)]
    texts = [[b["messages"][0]["parts"][0]["content"] for b in row["conversation_branches"]]
             for row in rows]  # fmt: skip
    assert texts == [[str(n), f"{2 + n % 7} words"] for n in range(20)]


def test_record_of_a_chunk_counts_its_own_tokens(prompts, tmp_path):
    run(settings(prompts), tmp_path / "run")
    records = sorted((tmp_path / "run/chunks").glob("0*.json"))
    found = [json.loads(path.read_text())["timing"]["num_tokens"] for path in records]
    assert found == [3, 3, 3, 3, 3, 3, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_merged_bytes_do_not_depend_on_the_number_of_workers(count, prompts, expected, tmp_path):
    for index in reversed(range(count)):
        run(settings(prompts, workers={"index": index, "count": count}), tmp_path / "run")
    assert not (tmp_path / "run/dataset").exists()

    def never() -> CountWords:
        raise AssertionError("all chunks are done")

    run(settings(prompts), tmp_path / "run", never)
    assert hash_files(tmp_path / "run/dataset") == expected


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_each_worker_would_do_every_chunk_once_its_own_first(count):
    for number in range(count):
        order = WorkerPlace(number, count, waits=False).order(tuple(range(20)))
        assert sorted(order) == list(range(20))
        assert order[: len(range(number, 20, count))] == [*range(number, 20, count)]


def test_workers_at_once_share_the_chunks_and_end_in_the_same_bytes(prompts, expected, tmp_path):
    processes = [
        start(settings(prompts, workers={"index": index, "count": 3}), tmp_path / "run")
        for index in range(3)
    ]
    processes.append(start(settings(prompts), tmp_path / "run"))  # waits for the others' chunks
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert hash_files(tmp_path / "run/dataset") == expected
    assert not list((tmp_path / "run/chunks").glob("0*.lock"))


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 60))]
)
def test_killed_anywhere_and_restarted_with_other_workers_gives_the_same_bytes(
    seed, prompts, expected, tmp_path
):
    """Killed three times, before or after a point; the first four seeds reach every point."""
    chance = random.Random(seed)
    points = [(point, when) for point in KILL_POINTS for when in ("before", "after")]
    num_killed = 0
    for point, when in points[seed::4] if seed < 4 else chance.sample(points, 3):
        merges = KILL_POINTS[point][0] is merge
        index = None if merges or chance.random() < 0.5 else 0
        config = settings(prompts, workers={"index": index, "count": chance.choice([1, 2, 5])})
        nth = 2 if point.startswith("a chunk") and chance.random() < 0.3 else 1
        process = start(config, tmp_path / "run", (point, nth, when))
        process.join(60)
        assert process.exitcode in (0, -9)  # 0: an earlier one had left nothing to do there
        num_killed += process.exitcode == -9
    assert num_killed
    run(settings(prompts), tmp_path / "run")
    assert hash_files(tmp_path / "run/dataset") == expected


def test_restart_does_the_missing_chunks_only(prompts, expected, tmp_path):
    run(settings(prompts, workers={"index": 0, "count": 1}), tmp_path / "run")
    for name in ("000002", "000005"):
        (tmp_path / f"run/chunks/{name}.json").unlink()
    annotators = []

    def make() -> CountWords:
        annotators.append(CountWords())
        return annotators[-1]

    run(settings(prompts), tmp_path / "run", make)
    assert [annotator.calls for annotator in annotators] == [[3, 3]]
    assert hash_files(tmp_path / "run/dataset") == expected


def broken_by(change, prompts: Path, tmp_path: Path) -> str:
    """What the merge says of a run whose chunk 1 was changed."""
    run(settings(prompts, workers={"index": 0, "count": 1}), tmp_path / "run")
    path = tmp_path / "run/chunks/000001.jsonl"
    change(path)
    with pytest.raises(PostTrainingError) as error:
        run(settings(prompts), tmp_path / "run")
    assert error.value.where == str(path)
    assert not (tmp_path / "run/dataset").exists()
    return error.value.problem


def rewrite(path: Path, lines: list[str]) -> None:
    """As somebody would who also mends the record's sha256."""
    from post_training.core.hashing import sha256_file

    path.write_text("".join(lines))
    record = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**record, "sha256": sha256_file(path)}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "chunk 1 has lost its rows"),
        (lambda path: path.write_text(path.read_text()[:-9]), "chunk 1 has other bytes than"),
        (lambda path: rewrite(path, _lines(path)[1:]), "chunk 1 has lost row "),
        (lambda path: rewrite(path, _lines(path)[:2] * 2), "chunk 1 has row "),
        (lambda path: rewrite(path, _lines(path)[::-1]), "chunk 1 has its rows in another order"),
        (
            lambda path: rewrite(path, _lines(path) + _lines(path.with_name("000002.jsonl"))),
            "chunk 1 has a row it was not given, ",
        ),
        (
            lambda path: path.with_suffix(".json").write_bytes(
                path.with_name("000002.json").read_bytes()
            ),
            "chunk 1 was made of other rows or settings",
        ),
    ],
)
def test_merge_finds_what_was_lost_doubled_moved_or_changed(change, problem, prompts, tmp_path):
    assert broken_by(change, prompts, tmp_path).startswith(problem)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_input_rows_that_changed_under_the_plan_are_found(prompts, tmp_path):
    run(settings(prompts, workers={"index": 0, "count": 1}), tmp_path / "run")
    (tmp_path / "run/chunks/000001.json").unlink()
    path = tmp_path / "run/chunks/input.jsonl"
    path.write_bytes(path.read_bytes().replace(b"question 4", b"question 8"))
    with pytest.raises(PostTrainingError, match="the rows have changed since they were planned"):
        run(settings(prompts), tmp_path / "run")


class NextVersion(ChunkedStageConfig):
    version: ClassVar[int] = ChunkedStageConfig.version + 1


def test_another_run_does_not_mix_with_the_chunks_and_the_setting_is_named(prompts, tmp_path):
    worker = {"index": 0, "count": 1}
    run(settings(prompts, workers=worker), tmp_path / "run")
    with pytest.raises(UsageError, match="another run: recipe: chunk_rows: 3 -> 4"):
        run(settings(prompts, chunk_rows=4), tmp_path / "run")
    with pytest.raises(UsageError, match="another run: image: oci_digest: 'unpinned' -> 'sha256"):
        run(settings(prompts), tmp_path / "run", image={"oci_digest": "sha256:a"})
    with pytest.raises(PostTrainingError, match="another version of the stage: "):
        run(settings(prompts), tmp_path / "run", config_class=NextVersion)
    write_prompts(prompts, 21)
    with pytest.raises(UsageError, match="another run: input: data: "):
        run(settings(prompts), tmp_path / "run")


def test_chunks_of_other_settings_are_not_merged_though_their_plan_is_gone(prompts, tmp_path):
    run(settings(prompts, workers={"index": 0, "count": 1}), tmp_path / "run")
    (tmp_path / "run/chunks/manifest.json").unlink()
    config = settings(prompts)
    config["data"] |= {"deduplicate": True}  # It finds nothing here, so the chunks' rows are equal.
    with pytest.raises(PostTrainingError, match="chunk 0 was made of other rows or settings"):
        run(config, tmp_path / "run")


def test_worker_index_beyond_the_count_is_refused(prompts):
    with pytest.raises(ValueError, match="index: must be < count, 2"):
        ChunkedStageConfig.model_validate(settings(prompts, workers={"index": 2, "count": 2}))


def test_the_same_prompt_twice_is_a_bad_row(prompts, tmp_path):
    prompts.write_text(prompts.read_text() + _lines(prompts)[3])
    with pytest.raises(PostTrainingError, match=r"a second row [0-9a-f]{64}") as error:
        run(settings(prompts), tmp_path / "run")
    assert error.value.where == f"{prompts}:21"
    config = settings(prompts)
    config["data"] |= {"on_error": "quarantine"}
    result = run(config, tmp_path / "other")
    assert (result.metrics["num_rows"], result.metrics["num_rejected"]) == (20, 1)
    [reject] = [json.loads(x) for x in (tmp_path / "other/rejects.jsonl").read_text().splitlines()]
    assert (reject["line"], reject["reason"]) == (21, "duplicate")
    assert len(set(ids(tmp_path / "other/dataset/rows.jsonl"))) == 20


def test_what_was_read_of_the_rows_is_in_the_plan_and_in_the_dataset(tmp_path):
    prompt = {"role": "user", "content": "one two"}
    row = {"conversation_id": "7", "initial_prompt": prompt, "conversation_branches": []}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({**row, "topic": "lakes"}) + "\n")
    run(settings(data), tmp_path / "run")
    [told] = json.loads((tmp_path / "run/dataset/counts.json").read_text())["sources"]
    assert told == {
        "read_as": "swissai (initial_prompt, conversation_branches)",
        "num_rows": 1,
        "num_source_rows": 1,
        "columns": [
            {"name": "conversation_id", "read_as": "id", "number": 1},
            {"name": "initial_prompt", "read_as": "initial_prompt", "number": 1},
            {"name": "topic", "read_as": None, "number": 1},
        ],
    }
    assert json.loads((tmp_path / "run/chunks/manifest.json").read_text())["sources"] == [told]
    # A plan of an older version has none.
    manifest = json.loads((tmp_path / "run/chunks/manifest.json").read_text())
    del manifest["sources"]
    (tmp_path / "run/chunks/manifest.json").write_text(json.dumps(manifest))
    run(settings(data), tmp_path / "run")
    assert "sources" not in json.loads((tmp_path / "run/dataset/counts.json").read_text())
