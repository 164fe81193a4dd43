"""Debug runs, and ranks that were started differently: through the entrypoint, as a user would."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.stage_process import start_entrypoint


@pytest.fixture
def folder(tmp_path: Path, dataset: Path) -> Path:
    """Where the entrypoint is called; it holds split.yaml (JSON is YAML)."""
    data = {"datasets": [{"path": str(dataset)}], "num_workers": 1}
    (tmp_path / "split.yaml").write_text(json.dumps({"data": data, "eval_size": 10}))
    return tmp_path


def arguments(*overrides: str) -> list[str]:
    return ["split", "split.yaml", "--unpinned", *overrides]


def split(folder: Path, *overrides: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    process = start_entrypoint(arguments(*overrides), log, folder=folder)
    process.join(60)
    return process.exitcode, log.read_text()


def records(folder: Path) -> dict[str, Any]:
    return {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in folder.rglob("run.json")
    }


def test_debug_run_has_its_own_place_and_its_record_says_so(folder: Path):
    for overrides in ([], ["debug.enabled=true"]):
        code, said = split(folder, *overrides)
        assert code == 0, said
    (usual, one), (debug, other) = sorted(records(folder).items(), key=lambda item: len(item[0]))
    assert debug == usual.replace("runs/", "runs/debug/")
    assert (one["debug"], other["debug"]) == (False, True)
    assert one["identity"] == other["identity"]


def test_debug_run_is_overridden_when_asked_and_only_then(folder: Path):
    assert split(folder, "debug.enabled=true")[0] == 0
    (place, first), *_ = records(folder).items()
    (folder / place / "notes.txt").write_text("mine")
    code, said = split(folder, "debug.enabled=true")
    assert code == 2
    assert "this run is finished" in said
    assert records(folder)[place] == first
    override = ("debug.enabled=true", "debug.override_existing=true", "seed=1", f"run_dir={place}")
    assert split(folder, *override)[0] == 0
    assert records(folder)[place]["run_id"] != first["run_id"]
    assert not (folder / place / "notes.txt").exists()


def test_override_existing_leaves_a_run_that_is_none_of_debug(folder: Path):
    assert split(folder, "run_dir=run")[0] == 0
    before = records(folder)
    override = ("debug.enabled=true", "debug.override_existing=true", "run_dir=run")
    code, said = split(folder, *override)
    assert code == 2
    assert "error: run: not a debug run, so debug.override_existing leaves it" in said
    assert records(folder) == before
    (folder / "thesis").mkdir()
    (folder / "thesis" / "thesis.txt").write_text("x")
    code, said = split(folder, *override[:2], "run_dir=thesis")
    assert code == 2
    assert "holds no run (found 'thesis.txt')" in said
    assert (folder / "thesis" / "thesis.txt").exists()


def test_ranks_with_other_settings_are_refused_by_name_on_every_rank(folder: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    overrides = ([], ["seed=3"])
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "post_training.stages"),
                *arguments(*overrides[rank], "num_threads=1"),
            ],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGKILL)
    problem = "error: rank 1 was started with other settings than rank 0: seed: 0 -> 3"
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert all(problem in text for text in said)
    assert not records(folder)
