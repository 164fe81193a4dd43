"""A record as the first version wrote it: without seal, debug, accelerators or made_by. Whatever is
added since, it is read for as long as its schema's number stands."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from post_training.records import run_record

RECORD = Path(__file__).with_name("record_of_the_first_version.json")
SCHEMA = Path(run_record.__file__).with_name("schemas") / "run-record-1.schema.json"
RUN_ID = "sft-20260102-030405-0a1b2c"


@pytest.fixture
def runs(tmp_path):
    """runs/one and runs/two, the same."""
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(RECORD, tmp_path / "runs" / name / "run.json")
    return tmp_path / "runs"


def test_record_of_the_first_version_is_as_todays_schema_says():
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert [error.message for error in validator.iter_errors(json.loads(RECORD.read_text()))] == []


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["runs", "show", "runs/one"], 0, "attempt 1    finished, 2026-01-02T03:04:05+00:00"),
        (["runs", "diff", "runs/one", "runs/two"], 0, "outcome      identical: 1 files"),
        (["runs", "list"], 0, "runs/one  sft    finished"),
        (["runs", "export", RUN_ID], 0, f"{RUN_ID}.zip"),
        (
            ["reproduce", "runs/one", "--dry-run", "--store", "store"],
            2,
            "model.path: gone: /work/init/model",
        ),
    ],
)
def test_record_of_the_first_version_is_read(runs, post_training, tmp_path, words, code, answer):
    done = post_training(*words, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == code, done.stderr
    assert answer in done.stdout + done.stderr
    assert "changed by hand" not in done.stdout + done.stderr
    if "list" not in words:
        assert "of the first version has no seal" in done.stdout + done.stderr


@pytest.mark.parametrize("words", [["diff", "runs/two", "runs/one"], ["export", "runs/one"]])
def test_record_changed_by_hand_is_told_by_diff_and_export(runs, post_training, tmp_path, words):
    path = runs / "one/run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seal": "of what it was"}))
    done = post_training("runs", *words, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == (4 if words[0] == "diff" else 0)
    assert (
        "run.json: was changed by hand (its seal is of something else)" in done.stdout + done.stderr
    )
    if words[0] == "export":
        with zipfile.ZipFile(tmp_path / f"{RUN_ID}.zip") as archive:
            assert "run.json" in archive.namelist()
            assert "provenance.intoto.json" not in archive.namelist()


@pytest.mark.parametrize("words", [["reproduce"], ["runs", "show"], ["runs", "export"]])
def test_archive_in_the_place_of_a_run_is_one_clear_line(runs, post_training, words):
    (runs.parent / "run.zip").write_bytes(b"PK")
    done = post_training(*words, "run.zip")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: run.zip: a file, and not the folder of a run",
        "hint: an export has no weights and no data to go on from: give the run's folder or id",
    ]
