"""A server on this machine that speaks as much as the hub's own client asks for."""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

COMMIT = "abcdef0123" * 4


class Hub(ThreadingHTTPServer):
    """kind: of owner/name, dataset or model. files: of it at COMMIT, its main branch; of those
    in `large` the sha256 is told. sent: what is really sent of them. cut: a file that is sent by
    half only, and never ends where `hang` is set."""

    def __init__(self, kind: str, files: dict[str, bytes], large: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.files, self.large = kind, files, large
        self.sent = dict(files)
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
        api, files = f"/api/{self.server.kind}s/owner/name", self.server.files
        pages = "/datasets/owner/name" if self.server.kind == "dataset" else "/owner/name"
        if path in (api, f"{api}/revision/main"):
            self.answer({"id": "owner/name", "sha": COMMIT, "siblings": []})
        elif path == f"{api}/tree/{COMMIT}":
            recursive = "recursive=true" in urlparse(self.path).query.lower()
            self.answer(list(self.entries(files, recursive)))
        elif path.startswith(prefix := f"{pages}/resolve/{COMMIT}/"):
            self.send(path.removeprefix(prefix))
        else:
            is_known = path.startswith(api)
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if is_known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def entries(self, files: dict[str, bytes], recursive: bool) -> Iterator[dict[str, Any]]:
        """Of a folder its files are named where they are asked for, and else itself."""
        for name, data in files.items():
            if recursive or "/" not in name:
                yield self.entry(name, data)
        for folder in {name.partition("/")[0] for name in files if "/" in name}:
            yield {"type": "directory", "path": folder, "oid": "0" * 40}

    def entry(self, name: str, data: bytes) -> dict[str, Any]:
        told = {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
        if name in self.server.large:
            sha256 = hashlib.sha256(data).hexdigest()
            told["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return told

    def answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send(self, name: str) -> None:
        data = self.server.sent[name]
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


@contextmanager
def serve_hub(kind: str, files: dict[str, bytes], large: tuple[str, ...] = ()) -> Iterator[Hub]:
    """A hub that runs while the block does."""
    server = Hub(kind, files, large)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def client_environment(hub: Hub | None, home: Path) -> dict[str, str]:
    """Variables by which the client asks this hub; None: one that is not there."""
    return {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port if hub else 9}",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
