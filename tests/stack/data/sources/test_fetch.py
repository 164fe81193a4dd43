"""The hub's own client against a server on this machine that speaks as much as it asks for."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.sources.open import open_source

COMMIT = "abcdef0123" * 4
ROWS = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(50)]
README = """---
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


class Hub(ThreadingHTTPServer):
    """files: of owner/name at COMMIT, its main branch. cut: a file that is sent by half only, and
    never ends where `hang` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            "README.md": README.encode(),
            "main/train.jsonl": lines(ROWS),
            "main/test.jsonl": lines(ROWS[:7]),
            "other.jsonl": lines(ROWS[:3]),
        }
        self.cut: str | None = None
        self.hang = threading.Event()
        self.is_hanging = threading.Event()
        self.released = threading.Event()
        self.requests: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
        self.server.requests.append(format % arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        api, files = "/api/datasets/owner/name", self.server.files
        if path in (api, f"{api}/revision/main"):
            self.answer({"id": "owner/name", "sha": COMMIT, "siblings": []})
        elif path == f"{api}/tree/{COMMIT}":
            self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in files.items()
                ]
            )
        elif path.startswith(prefix := f"/datasets/owner/name/resolve/{COMMIT}/"):
            self.send(path.removeprefix(prefix))
        else:
            is_known = path.startswith(api)
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if is_known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send(self, name: str) -> None:
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{digest(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name != self.server.cut:
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if self.server.hang.is_set():
            self.server.is_hanging.set()
            self.server.released.wait()
        self.close_connection = True


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def start(
    hub: Hub | None,
    hub_dir: Path,
    *,
    revision: str = "",
    subset: str = "main",
    split: str = "train",
) -> "subprocess.Popen[str]":
    endpoint = f"http://127.0.0.1:{hub.server_port if hub else 9}"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(hub_dir.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "owner/name", revision, subset, split, str(hub_dir)],
        env=environment,
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
