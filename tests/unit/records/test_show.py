import json

import pytest

from post_training.cli.show import show_run
from post_training.records.run import RunDescription, RunFolder


@pytest.fixture
def description(facts):
    return RunDescription("sft", {"lr": 1e-3}, {"world_size": 1}, {}, None, facts)


def test_show_run_has_figures_and_speeds_on_lines_of_their_own(tmp_path, capsys, description):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.start(description)
    metrics = {"num_steps": 12, "loss": 2.25, "timing": {"step_s": 0.5, "tokens_per_s": 1024.0}}
    folder.close("finished", outputs={"artifacts": {}, "files": {}}, metrics=metrics)
    show_run(tmp_path, "finished", as_json=False)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "metrics      num_steps=12, loss=2.25",
        "timing       step_s=0.5, tokens_per_s=1024",
        "checked      the record, 0 files by their bytes",
    ]


@pytest.mark.parametrize(
    ("closed", "state", "told"),
    [
        (None, "running", "running"),
        (None, "killed", "killed (its record was never closed); the same command continues it"),
        (None, "queued", "queued; before that killed (its record was never closed)"),
        ("interrupted", "interrupted", "interrupted: SIGTERM"),
        ("interrupted", "waiting", "waiting; before that interrupted: SIGTERM"),
    ],
)
def test_show_run_says_its_state_and_what_the_record_knows(
    tmp_path, capsys, description, closed, state, told
):
    folder = RunFolder(tmp_path)
    folder.claim()
    folder.start(description)
    if closed:
        folder.close(closed, "SIGTERM")
    written = (tmp_path / "run.json").read_bytes()
    show_run(tmp_path, state, as_json=False)
    assert capsys.readouterr().out.splitlines()[1] == f"status       {told}"
    show_run(tmp_path, state, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        **json.loads(written),
        "state": state,
        "faults": [],
    }
    assert (tmp_path / "run.json").read_bytes() == written
