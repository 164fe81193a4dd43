"""Datasets are fetched by the hub's own client, from a server on this machine."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.hub_server import COMMIT, Hub, client_environment, serve_hub
from post_training.data.config import DatasetConfig
from post_training.data.sources.open import open_source

ROWS = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(50)]
README = """---
license: cc-by-4.0
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.jsonl
  - split: test
    path: main/test.jsonl
- config_name: other
  data_files: other.jsonl
---
"""
SCRIPT = """
import sys
from pathlib import Path
from post_training.core.errors import report
from post_training.data.sources.hub import fetch
hub, revision, subset, split, hub_dir = sys.argv[1:]
try:
    print(fetch(hub, revision or None, subset or None, split, Path(hub_dir)).settings())
except (Exception, KeyboardInterrupt) as error:
    sys.exit(report(error))
"""


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {
        "README.md": README.encode(),
        "main/train.jsonl": lines(ROWS),
        "main/test.jsonl": lines(ROWS[:7]),
        "other.jsonl": lines(ROWS[:3]),
    }
    with serve_hub("dataset", files) as server:
        yield server


def start(
    hub: Hub | None,
    hub_dir: Path,
    *,
    revision: str = "",
    subset: str = "main",
    split: str = "train",
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "owner/name", revision, subset, split, str(hub_dir)],
        env=client_environment(hub, hub_dir.parent / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts with `&` ignores Ctrl-C, and so do its children: these may not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def fetch(hub: Hub | None, hub_dir: Path, **arguments: str) -> tuple[int, str, str]:
    process = start(hub, hub_dir, **arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def test_fetch_brings_one_split_and_says_its_commit(hub: Hub, tmp_path: Path):
    hub_dir = tmp_path / "hub"
    code, output, errors = fetch(hub, hub_dir)
    assert (code, output) == (
        0,
        f"- hub: owner/name\n  revision: {COMMIT}\n  subset: main\n  split: train\n",
    ), errors
    dataset = DatasetConfig(hub="owner/name", revision=COMMIT, subset="main", split="train")
    chunks = open_source(dataset, hub_dir).chunks()
    assert [record.value for chunk in chunks for record in chunk.records()] == ROWS
    folder = hub_dir / "owner--name" / COMMIT / "main" / "train"
    assert sorted(path.name for path in folder.iterdir()) == ["fetched.json", "rows.parquet"]
    assert json.loads((folder / "fetched.json").read_text())["licence"] == "cc-by-4.0"
    assert [path.name for path in hub_dir.iterdir()] == ["owner--name"]

    # What is there is not asked for again.
    hub.requests.clear()
    code, again, _ = fetch(hub, hub_dir, revision=COMMIT)
    assert (code, again) == (0, output)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"split": "dev"}, "error: hub: owner/name: no split 'dev'\nhint: splits: train, test\n"),
        ({"subset": "none"}, "error: hub: owner/name: can't be loaded: BuilderConfig 'none' not f"),
        ({"subset": ""}, "error: hub: owner/name: can't be loaded: Config name is missing."),
        ({"revision": "v9"}, "error: hub: owner/name: the hub has no such revision of it\n"),
    ],
)
def test_fetch_of_what_is_not_there_is_refused_and_leaves_nothing(
    arguments: dict[str, str], problem: str, hub: Hub, tmp_path: Path
):
    hub_dir = tmp_path / "hub"
    code, _, errors = fetch(hub, hub_dir, **arguments)
    assert code == 2
    assert problem in errors
    assert not hub_dir.exists() or list(hub_dir.iterdir()) == []


def test_fetch_without_a_hub_fails(tmp_path: Path):
    code, _, errors = fetch(None, tmp_path / "hub")
    assert code == 1
    assert "error: hub: owner/name: the download failed: " in errors


def test_fetch_by_two_at_once_gives_both_the_same(hub: Hub, tmp_path: Path):
    both = [start(hub, tmp_path / "hub") for _ in range(2)]
    ended = [(process.communicate(timeout=120), process.returncode) for process in both]
    assert [code for _, code in ended] == [0, 0], ended
    assert len({output for (output, _), _ in ended}) == 1
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["owner--name"]


def test_fetch_that_is_cut_short_fails_and_leaves_nothing(hub: Hub, tmp_path: Path):
    hub.cut = "main/test.jsonl"
    code, _, errors = fetch(hub, tmp_path / "hub")
    assert code == 1
    assert "error: hub: owner/name: the download failed: " in errors
    assert list((tmp_path / "hub").iterdir()) == []


def test_fetch_that_is_interrupted_leaves_nothing_and_can_be_repeated(hub: Hub, tmp_path: Path):
    hub.cut = "main/train.jsonl"
    hub.hang.set()
    process = start(hub, tmp_path / "hub")
    assert hub.is_hanging.wait(60)
    process.send_signal(signal.SIGINT)
    hub.released.set()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "error: interrupted")
    assert list((tmp_path / "hub").iterdir()) == []
    hub.cut = None
    assert fetch(hub, tmp_path / "hub")[0] == 0
