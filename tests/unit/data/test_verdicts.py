import base64
import json
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.data.reading import Verdicts
from post_training.data.rows import BadRow, Place

PLACE = Place("rows.jsonl", 12, 3456)


def test_verdicts_fail_names_the_place_and_the_way_round(tmp_path: Path):
    with (
        Verdicts("fail", tmp_path / "rejects.jsonl") as verdicts,
        pytest.raises(PostTrainingError) as raised,
    ):
        verdicts.reject(PLACE, BadRow("empty", "answer: is empty"), b"{}")
    assert str(raised.value).splitlines() == [
        "rows.jsonl:12: answer: is empty",
        "hint: mend the row, or leave bad rows out: on_error: skip, or quarantine",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reason", ["too-long", "filtered"])
def test_verdicts_fail_leaves_out_what_a_setting_asked_for(reason: str, tmp_path: Path):
    with Verdicts("fail", tmp_path / "rejects.jsonl") as verdicts:
        verdicts.reject(PLACE, BadRow(reason, "…"), b"{}")
    assert verdicts.counts == {reason: 1}


def test_verdicts_skip_counts_by_reason_and_writes_nothing(tmp_path: Path):
    with Verdicts("skip", tmp_path / "rejects.jsonl") as verdicts:
        for reason in ("empty", "roles", "empty"):
            verdicts.reject(PLACE, BadRow(reason, "…"), b"{}")
        verdicts.count("roles", 3)
        verdicts.count("too-long", 0)
    assert verdicts.summary() == "6 rows left out: 2 empty, 4 roles"
    assert list(tmp_path.iterdir()) == []


def test_verdicts_quarantine_keeps_the_row_byte_for_byte(tmp_path: Path):
    rows = ['{"text": "é"}'.encode(), b'{"text": "\xff"}']
    with Verdicts("quarantine", tmp_path / "rejects.jsonl") as verdicts:
        for raw in rows:
            verdicts.reject(PLACE, BadRow("malformed", "why", "how"), raw)
    text, binary = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert text == {
        "file": "rows.jsonl",
        "line": 12,
        "byte": 3456,
        "reason": "malformed",
        "problem": "why",
        "hint": "how",
        "raw": '{"text": "é"}',
    }
    assert base64.b64decode(binary["raw_base64"]) == rows[1]


def test_verdicts_fail_tells_how_such_rows_can_be_used(tmp_path: Path):
    bad = BadRow("columns", "why", "ignore: [label]")
    with Verdicts("fail", tmp_path / "x") as verdicts, pytest.raises(PostTrainingError) as raised:
        verdicts.reject(PLACE, bad, b"{}")
    assert raised.value.hint == (
        "ignore: [label]; or leave bad rows out: on_error: skip, or quarantine"
    )
