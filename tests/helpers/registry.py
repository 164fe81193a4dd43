"""A real registry on this machine's loopback address, with and without a password."""

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

USER, PASSWORD = "toy", "not-a-real-one"
_CONFIG = """
version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:0"}}
"""
_LOCKED = "auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"


class Registry(NamedTuple):
    """host: its address and port. data: the folder in which it keeps blobs."""

    host: str
    data: Path

    def blob(self, digest: str) -> Path:
        algorithm, hexadecimal = digest.split(":")
        blobs = self.data / "docker/registry/v2/blobs"
        return blobs / algorithm / hexadecimal[:2] / hexadecimal / "data"


@contextmanager
def serving(folder: Path, password_hash: str | None = None) -> Iterator[Registry]:
    """Debian's docker-registry, until the end. password_hash: of USER's, by bcrypt."""
    folder.mkdir()
    config = _CONFIG + (_LOCKED if password_hash else "")
    (folder / "config.yml").write_text(config.format(folder=folder))
    if password_hash:
        (folder / "htpasswd").write_text(f"{USER}:{password_hash}\n")
    server = subprocess.Popen(
        ["docker-registry", "serve", folder / "config.yml"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = ""
        for line in server.stderr:
            said += line
            if found := re.search(r"listening on (127\.0\.0\.1:\d+)", line):
                break
        else:
            raise AssertionError(f"docker-registry did not start: {said}")
        # A full pipe would stop it.
        threading.Thread(target=server.stderr.read, daemon=True).start()
        yield Registry(found[1], folder / "data")
    finally:
        server.terminate()
        server.wait(600)
