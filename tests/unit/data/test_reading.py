"""Rows of a source: what is read of each does not depend on their order, nor on the workers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.worker_functions import ReadingState, read_one_row, read_rows
from post_training.core.errors import PostTrainingError
from post_training.data.config import SourcesConfig
from post_training.data.formats.columns import ColumnReport, describe_columns
from post_training.data.reading import Reader, open_sources, read_chunks
from post_training.data.rows import BadRow, Conversation

FRENCH = {"question": "Name a lake.", "response": "Lac Léman.", "system_prompt": "In French."}
PLAIN = {"question": "Name a lake.", "response": "Lake Thun."}
LABELLED = {**PLAIN, "label": False}


def read(
    path: Path,
    rows: list[dict[str, Any]],
    num_workers: int = 1,
    on_error: str = "skip",
    transforms: Sequence[Path] = (),
    **settings: Any,
) -> tuple[list[Any], list[tuple[int, str]], dict[str, Any]]:
    """Its rows, its rejected ones by number, and the record of its columns."""
    path.write_text(json.dumps(rows))
    dataset = {"path": path, **settings}
    config = SourcesConfig(
        datasets=[dataset], transforms=transforms, num_workers=num_workers, on_error=on_error
    )
    sources, formats = open_sources(config)
    report = ColumnReport(formats)
    state = ReadingState(Reader(config, formats))
    found: list[Any] = []
    rejected: list[tuple[int, str]] = []
    for chunk in read_chunks(read_rows, state, sources, config, lambda _: 0, report):
        found += chunk.rows
        rejected += [(each.place.number, each.bad.problem) for each in chunk.rejected]
    return found, rejected, report.record(0)


@pytest.mark.parametrize("rows", [[FRENCH, PLAIN], [PLAIN, FRENCH]])
def test_rows_column_of_any_row_is_read(rows: list[dict[str, Any]], tmp_path: Path):
    found, rejected, _ = read(tmp_path / "rows.json", rows)
    assert rejected == []
    systems = [row.messages[0].content for row in found if len(row.messages) == 3]
    assert systems == ["In French."]


@pytest.mark.parametrize("rows", [[LABELLED, PLAIN], [PLAIN, LABELLED]])
def test_rows_that_are_refused_do_not_depend_on_their_order(
    rows: list[dict[str, Any]], tmp_path: Path
):
    found, rejected, _ = read(tmp_path / "rows.json", rows)
    assert len(found) == 1
    assert rejected == [
        (
            rows.index(LABELLED) + 1,
            "column label is not read, and it changes what is said or trained",
        )
    ]


def test_rows_that_are_all_refused_are_told_with_the_way_on(tmp_path: Path):
    with pytest.raises(PostTrainingError) as error:
        read(tmp_path / "rows.json", [LABELLED, LABELLED])
    assert "column label is not read" in error.value.problem
    assert "ignore: [label]" in str(error.value.hint)
    with pytest.raises(PostTrainingError) as error:
        read(tmp_path / "rows.json", [LABELLED, PLAIN], on_error="fail")
    assert error.value.where == f"{tmp_path / 'rows.json'}:1"
    assert "ignore: [label]" in str(error.value.hint)


def test_rows_ignored_columns_are_told_with_how_often_they_are_there(tmp_path: Path):
    ignore = ["label", "lable"]
    found, rejected, record = read(tmp_path / "rows.json", [LABELLED] * 2, ignore=ignore)
    assert (len(found), rejected) == (2, [])
    assert {"name": "label", "read_as": None, "number": 2} in record["columns"]
    assert {"name": "lable", "read_as": None, "number": 0} in record["columns"]


def test_rows_and_their_columns_are_the_same_for_any_number_of_workers(tmp_path: Path):
    rows: list[dict[str, Any]] = [{**PLAIN, "id": number} for number in range(1200)]
    rows[900] = {**FRENCH, "source": "toy"}
    rows[1100] = LABELLED
    one, several = (read(tmp_path / "rows.json", rows, number) for number in (1, 3))
    assert one == several
    found, rejected, record = one
    assert all(isinstance(row, Conversation) for row in found)
    assert (len(found), [number for number, _ in rejected]) == (1199, [1101])
    assert record == {
        "num_source_rows": 1200,
        "columns": [
            {"name": "id", "read_as": None, "number": 1198},
            {"name": "label", "read_as": None, "number": 1},
            {"name": "question", "read_as": "prompt", "number": 1200},
            {"name": "response", "read_as": "completion", "number": 1200},
            {"name": "source", "read_as": None, "number": 1},
            {"name": "system_prompt", "read_as": "system", "number": 1},
        ],
    }


@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_that_are_read_leave_no_process_of_their_transform(num_workers: int, tmp_path: Path):
    path, pids = tmp_path / "keep.py", tmp_path / "pids"
    path.write_text(
        "import os\nfrom post_training.data.transforms import register_transform\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "@register_transform('keep')\ndef keep(row): return row\n"
    )
    rows = [{**PLAIN, "id": number} for number in range(1200)]
    found, _, _ = read(
        tmp_path / "rows.json", rows, num_workers, transforms=[path], transform="keep"
    )
    assert len(found) == 1200
    ours, *of_workers = map(int, pids.read_text().split())  # those end with their workers
    assert bool(of_workers) == (num_workers > 1)
    with pytest.raises(ProcessLookupError):
        os.kill(ours, 0)


def test_columns_are_told_in_two_lines():
    columns = [
        {"name": "messages", "read_as": "messages", "number": 9},
        {"name": "messages[].reasoning", "read_as": "thought", "number": 1200},
        {"name": "tools", "read_as": "tools", "number": 9},
        *({"name": f"c{number:02}", "read_as": None, "number": 9} for number in range(14)),
    ]
    read_too, unread = describe_columns({"name": "chats", "columns": columns})
    assert read_too == "chats: also read: messages[].reasoning as thought (1,200), tools (9)"
    assert unread.startswith("chats: not read: c00 (9), c01 (9), ")
    assert unread.endswith(", c11 (9) and 2 more")
    assert list(describe_columns({"name": "old"})) == []


def test_bad_row_travels_between_processes_with_its_hint():
    import pickle

    bad = pickle.loads(pickle.dumps(BadRow("columns", "why", "how")))
    assert (bad.reason, bad.problem, bad.hint) == ("columns", "why", "how")


class ThreeChunks:
    def chunks(self) -> list[str]:
        return ["one", "two", "three"]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(("enough", "num_read"), [(None, 3), (4, 3), (2, 2), (1, 1)])
def test_read_chunks_of_a_dataset_end_with_the_row_that_suffices(
    enough: int | None, num_read: int, num_workers: int
):
    """Each chunk has one row here; what workers read beyond, bad rows in it too, must not show."""
    config = SourcesConfig(debug_subsample=enough, num_workers=num_workers)
    state = ReadingState(Reader(config, ()))
    sources: Any = [ThreeChunks(), ThreeChunks()]
    report = ColumnReport([Any, Any])
    counted = [0, 0]
    chunks = []
    for each in read_chunks(read_one_row, state, sources, config, counted.__getitem__, report):
        counted[each.dataset] += 1
        chunks.append((each.dataset, each.chunk))
    kept = ThreeChunks().chunks()[:num_read]
    assert chunks == [(dataset, chunk) for dataset in (0, 1) for chunk in kept]
