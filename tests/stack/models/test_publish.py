"""`artifact publish --yes`: the hub's own client against a server on this machine that speaks as
much as it asks for."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

from helpers.ended_runs import ended_run

TOKEN = "hf_" + "aB3" * 12  # pragma: allowlist secret
COMMIT = "abcdef0123" * 4
LARGE = "weights"


class Hub(ThreadingHTTPServer):
    """files: of org/tiny; None: there is no such repository. Files named LARGE go the way of large
    ones. refuses: with this status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] | None = None
        self.stored: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.num_commits = 0
        self.refuses: int | None = None
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> Any:
        path = urlparse(self.path).path
        if path.startswith("/api/models/org/tiny/tree/main"):
            names = sorted(self.server.files or {})
            files = [{"type": "file", "path": n, "size": 1, "oid": 40 * "0"} for n in names]
            return self.answer(files)
        siblings = [{"rfilename": name} for name in sorted(self.server.files or {})]
        return self.answer({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> Any:
        path = urlparse(self.path).path
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses is not None:
            return self.answer({"error": "no"}, self.server.refuses)
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            status = 200 if self.server.files is None else 409
            self.server.files = self.server.files or {}
            return self.answer({"url": "/org/tiny", "name": "org/tiny"}, status)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"] == LARGE else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            host = self.server.address
            objects = [
                {**each, "actions": {"upload": {"href": f"{host}/put/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                self.commit(line["key"], line["value"])
            self.server.num_commits += 1
            url = f"{self.server.address}/org/tiny/commit/{COMMIT}"
            return self.answer({"commitOid": COMMIT, "commitUrl": url})
        return self.answer({"error": path}, 404)

    def commit(self, key: str, value: dict[str, Any]) -> None:
        files = self.server.files
        assert files is not None
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.server.stored[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    return ended_run(tmp_path / "runs/one", tmp_path / "base") / "model"


def publish(
    hub: Hub, model: Path, *arguments: str, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "post_training.cli", "artifact", "publish", str(model)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HOME": str(model.parents[2] / "hf")}
    if token is not None:
        (model.parents[2] / "token").write_text(token)
        env["HF_TOKEN_PATH"] = str(model.parents[2] / "token")
    return subprocess.run(
        [*words, *arguments], cwd=model.parents[2], env=env, capture_output=True, text=True
    )


def test_model_and_card_are_uploaded_and_nothing_else_is_left_there(hub: Hub, model: Path):
    dry = publish(hub, model, "org/tiny")
    assert (dry.returncode, hub.created) == (0, [])
    done = publish(hub, model, "org/tiny", "--license", "mit", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.address}/org/tiny/commit/{COMMIT}"
    assert hub.created[0]["visibility"] == "private"
    assert set(hub.files or {}) == {"README.md", "artifact.json", "config.json", "weights"}
    assert hub.files["weights"] == (model / "weights").read_bytes()
    assert hub.files["README.md"].startswith(b"---\nlicense: mit\n")
    # Names no folder of this machine, and holds together all the same.
    assert str(model.parents[2]).encode() not in hub.files["artifact.json"]
    copy = model.parents[2] / "copy"
    copy.mkdir()
    for name in ("artifact.json", "config.json", "weights"):
        (copy / name).write_bytes(hub.files[name])
    words = [sys.executable, "-m", "post_training.cli", "artifact", "verify", str(copy)]
    verified = subprocess.run(words, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr
    # A second model in the place of the first.
    hub.files["model-00001-of-00002.safetensors"] = hub.files[".gitattributes"] = b"old"
    again = publish(hub, model, "org/tiny", "--yes")
    assert again.returncode == 0, again.stderr
    assert again.stdout.endswith("(removed: model-00001-of-00002.safetensors)\n")
    assert set(hub.files) == {
        *("README.md", "artifact.json", "config.json", "weights", ".gitattributes")
    }
    assert hub.num_commits == 2
    assert hub.tokens <= {f"Bearer {TOKEN}", None}
    assert f"Bearer {TOKEN}" in hub.tokens
    assert TOKEN not in "".join(each.stdout + each.stderr for each in (dry, done, again))


@pytest.mark.parametrize(
    ("status", "token", "code", "problem"),
    [
        (None, None, 2, "the hub takes no files without a token"),
        (403, TOKEN, 2, "the hub refuses (403): the token may not write there"),
        (401, TOKEN, 2, "the hub refuses (401): the token may not write there"),
        (400, TOKEN, 1, "the upload failed"),
    ],
)
def test_upload_that_fails_is_one_line_without_the_token(
    hub: Hub, model: Path, status: int | None, token: str | None, code: int, problem: str
):
    hub.refuses = status
    done = publish(hub, model, "org/tiny", "--yes", token=token)
    assert (done.returncode, problem in done.stderr) == (code, True), done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert hub.num_commits == 0
