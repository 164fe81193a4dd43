"""`artifact card`, and `artifact publish` as far as it goes without a hub."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ended_runs import ended_run
from post_training.core import yaml
from post_training.core.errors import UsageError
from post_training.records.artifact import seal_artifact, seal_fetched
from post_training.records.card import CardDetails, write_card
from post_training.records.check import check_artifact

PREPARED = {
    "sources": [
        {"name": "chats", "num_rows": 9000, "num_used": 8000, "num_tokens": 1_234_567},
        {"name": "a|b", "num_rows": 1, "num_tokens": 5},
    ]
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Of a run whose base was made by another run; reproduced."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    one = ended_run(tmp_path / "runs/one", tmp_path / "base")
    two = ended_run(tmp_path / "runs/two", one / "model", recipe={"loss.name": "plw", "lora": None})
    (two / "data").mkdir()
    (two / "data/prepared.json").write_text(json.dumps(PREPARED))
    again = tmp_path / "runs/two-reproduced-1"
    again.mkdir()
    run_id = json.loads((two / "run.json").read_text())["run_id"]
    said = {"reproduces": run_id, "verdict": "identical", "path": "", "machine_differences": []}
    (again / "reproduction.json").write_text(json.dumps(said))
    return two / "model"


def command(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "post_training.cli", "artifact", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


def test_card_has_what_is_recorded_and_names_no_place(model: Path, tmp_path: Path):
    details = CardDetails("tiny", "org/base", "apache-2.0", {"chats": "cc-by-4.0"})
    text = write_card(model, details)
    _, front, body = text.split("---\n", 2)
    assert yaml.load(front.encode(), "card").data == {
        "license": "apache-2.0",
        "base_model": "org/base",
        "library_name": "transformers",
        "tags": ["post-training", "sft"],
    }
    record = json.loads((model.parent / "run.json").read_text())
    artifact = json.loads((model / "artifact.json").read_text())
    base = record["inputs"]["model.path"]
    first = base["made_by"]["inputs"]["model.path"]["fingerprint"]
    for expected in (
        "# tiny",
        f"run `{record['run_id']}`",
        "- model: org/base",
        f"- fingerprint: `{base['fingerprint']}`",
        f"- made by `sft`, run `{base['made_by']['run_id']}`",
        "| chats | 8,000 | 1,234,567 | cc-by-4.0 |",
        "| a\\|b | 1 | 5 | not stated |",
        "| `training.learning_rate` | 0.001 |",
        "| `loss.name` | plw |",
        "| `loss` | 1.5 |",
        "| `eval/loss` | 2.5 |",
        f"- this model: lineage `{artifact['lineage_hash']}`",
        f"    - `model.path`: base, fingerprint `{first[:12]}",
        f"`{record['image']['oci_digest']}`",
        f"- fingerprint: `{artifact['fingerprint']}`",
        "- verdict: run again in two-reproduced-1: identical",
    ):
        assert expected in body
    assert "lora" not in body
    assert str(tmp_path) not in text


def test_card_of_a_model_alone_says_what_is_not_known(model: Path, tmp_path: Path):
    alone = tmp_path / "alone"
    model.rename(alone)
    text = write_card(alone, CardDetails("alone"))
    assert "Which rows were used of them is not recorded beside the model." in text
    assert "They are in the record of the run, which is not beside the model." in text
    assert "no reproduction is recorded beside the run" in text
    assert "license" not in text.split("---")[1]


def test_card_of_a_merged_model_names_what_it_was_made_of(model: Path):
    artifact = json.loads((model / "artifact.json").read_text())
    record = artifact["made_by"]
    base = record["inputs"].pop("model.path")
    inputs = {"models[0].path": base, "models[1].path": base}
    (model / "artifact.json").unlink()
    seal_artifact(model, "model", {**record, "stage": "merge", "inputs": inputs})
    text = write_card(model, CardDetails("merged"))
    part = text.partition("## Base")[2].partition("## Data")[0]
    assert "at random" not in part
    for key in inputs:
        assert f"- `{key}`: model, fingerprint `{base['fingerprint'][:12]}…`, of `sft`" in part


def test_card_has_the_licences_that_were_fetched_with_base_and_data(tmp_path: Path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    seal_fetched(tmp_path / "base", "model", {"hub": "org/base", "revision": 40 * "a"})
    model = ended_run(tmp_path / "runs/one", tmp_path / "base") / "model"
    (model.parent / "data").mkdir()
    (model.parent / "data/prepared.json").write_text(json.dumps(PREPARED))
    record = json.loads((model / "artifact.json").read_text())["made_by"]
    licences = {"model.path": "llama3.1", "data.datasets[1]": "cc|by"}
    for known, of_base, of_data in ((licences, "llama3.1", "cc\\|by"), ({}, *2 * ["not stated"])):
        (model / "artifact.json").unlink()
        seal_artifact(model, "model", {**record, "licences": known})
        text = write_card(model, CardDetails("x"))
        _, front, body = text.split("---\n", 2)
        assert "base_model: org/base\n" in front
        assert "license" not in front
        assert "- model: org/base\n" in body
        assert f"- revision: `{40 * 'a'}`\n- licence, as its card states it: {of_base}\n" in body
        assert "| chats | 8,000 | 1,234,567 | not stated |" in body
        assert f"| a\\|b | 1 | 5 | {of_data} |" in body
    own = write_card(model, CardDetails("x", "me/other", licences={"a|b": "mit"}))
    assert "- model: me/other\n" in own
    assert "| a\\|b | 1 | 5 | mit |" in own


def test_card_of_a_model_that_was_fetched_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    seal_fetched(tmp_path, "model", {"hub": "org/name", "revision": 40 * "a"})
    with pytest.raises(UsageError, match="no run made it: fetched org/name"):
        write_card(tmp_path, CardDetails("x"))


def test_verdict_that_is_none_says_nothing(model: Path, tmp_path: Path):
    for name, text in {"cut": '{"reproduces": ', "other": "[]"}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "reproduction.json").write_text(text)
    assert write_card(model, CardDetails("x")).count("- verdict:") == 1


def test_card_of_a_dataset_or_with_a_licence_of_nothing_is_refused(model: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="the data have no such source"):
        write_card(model, CardDetails("x", licences={"chat": "mit"}))
    record = json.loads((model / "artifact.json").read_text())["made_by"]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.jsonl").write_text("{}\n")
    seal_artifact(tmp_path / "rows", "dataset", record)
    with pytest.raises(UsageError, match="is a dataset, not a model"):
        write_card(tmp_path / "rows", CardDetails("x"))


def test_card_command_writes_to_stdout_or_a_file_outside_the_artifact(model: Path, tmp_path: Path):
    done = command(tmp_path, "card", str(model), "--name", "tiny", "--source-license", "chats=mit")
    assert done.returncode == 0, done.stderr
    assert done.stdout == write_card(model, CardDetails("tiny", licences={"chats": "mit"}))
    written = command(tmp_path, "card", str(model), "-o", "card.md", "--name", "tiny")
    assert (written.returncode, written.stdout) == (0, "card.md\n")
    for arguments, problem in (
        (["-o", str(model / "README.md")], "--output: must be outside of the artifact"),
        (["--source-license", "chats"], "--source-license: must be NAME=LICENCE (got chats)"),
    ):
        done = command(tmp_path, "card", str(model), *arguments)
        assert (done.returncode, problem in done.stderr) == (2, True), done.stderr
    assert check_artifact(model).faults == []


def test_publish_without_yes_says_what_it_would_upload(model: Path, tmp_path: Path):
    done = command(tmp_path, "publish", str(model), "org/tiny")
    assert done.returncode == 0, done.stderr
    names = [line.split()[1] for line in done.stdout.splitlines()[:-1]]
    assert names == ["README.md", "artifact.json", "config.json", "weights"]
    assert done.stdout.splitlines()[-1].endswith("bytes in 4 files, for org/tiny")
    assert "nothing was uploaded; --yes does, to a private repository" in done.stderr


def test_publish_of_what_must_not_leave_is_refused(model: Path, tmp_path: Path):
    done = command(tmp_path, "publish", str(model), "tiny")
    assert "the repository must be ORG/NAME (got tiny)" in done.stderr
    done = command(tmp_path, "publish", str(model), "org/tiny", "--card", "none.md")
    assert "--card: no such file or directory" in done.stderr
    card = tmp_path / "card.md"
    card.write_text("token: hf_" + "aB3" * 12)
    done = command(tmp_path, "publish", str(model), "org/tiny", "--card", "card.md")
    assert (done.returncode, "holds a secret" in done.stderr) == (2, True), done.stderr
    (model / "weights").write_text("other")
    done = command(tmp_path, "publish", str(model), "org/tiny")
    assert (done.returncode, "is not what its run left: weights: changed" in done.stderr) == (
        1,
        True,
    )
