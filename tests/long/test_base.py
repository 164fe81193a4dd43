"""The real mmdebstrap and Debian: equal package versions are equal bytes, however they were had."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_file
from post_training.images.base import SNAPSHOT_VARIABLE, bootstrap, ensure_base
from post_training.images.recipe import BASE_LOCK, load_recipe
from post_training.images.store import ImageStore

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parents[2]
MOMENT = "20260101T000000Z"


@pytest.fixture
def snapshot_service(monkeypatch):
    """The mirrors under the addresses of a snapshot service."""

    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            _, archive, moment, *rest = self.path.strip("/").split("/")
            assert moment == MOMENT
            host = {"debian": "deb", "debian-security": "security"}[archive]
            self.send_response(302)
            self.send_header("Location", f"http://{host}.debian.org/{archive}/{'/'.join(rest)}")
            self.end_headers()

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(SNAPSHOT_VARIABLE, f"http://127.0.0.1:{server.server_port}/archive")
    yield
    server.shutdown()
    server.server_close()


def test_base_of_the_locked_versions_has_the_locked_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv(SNAPSHOT_VARIABLE, "http://127.0.0.1:9/archive")  # nobody listens
    recipe = load_recipe("cpu", REPOSITORY)
    base = ensure_base(recipe, ImageStore(tmp_path / "store"))
    if not base.is_locked:
        # Debian has moved on: the packages that did are named, and at least one did.
        assert base.moved != ["other bytes"], f"the same packages as in {BASE_LOCK}, other bytes"


def test_base_from_a_snapshot_is_the_base_from_the_mirrors(tmp_path, snapshot_service):
    """Nothing of the address it came from, or of the options that took, is left in it."""
    bootstrap(["ca-certificates"], tmp_path / "mirror.tar")
    bootstrap(["ca-certificates"], tmp_path / "snapshot.tar", snapshot=MOMENT)
    assert sha256_file(tmp_path / "mirror.tar") == sha256_file(tmp_path / "snapshot.tar")
