"""Which base a build takes: the locked one wherever it can be had, else the mirrors', marked so.

mmdebstrap is a fake here that packs the versions it finds in a file; tests/long has the real one.
"""

import json
import platform
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.images.base import (
    SNAPSHOT_VARIABLE,
    ensure_base,
    ensure_native_root,
    lock_base,
)
from post_training.images.build import image_identity
from post_training.images.recipe import Recipe
from post_training.images.store import ImageStore

MMDEBSTRAP = f"""#!{sys.executable}
import io, pathlib, sys, tarfile
if sys.argv[1:] == ["--version"]:
    print("mmdebstrap 9")
    sys.exit()
here = pathlib.Path(__file__).parent
with open(here / "asked", "a") as file:
    print(*sys.argv[1:], file=file)
target = next(word for word in sys.argv if word.endswith(".tar"))
state = "snapshot" if any(word.startswith("deb http://127.") for word in sys.argv) else "mirror"
status = (here / state).read_bytes()
with tarfile.open(target, "w") as archive:
    member = tarfile.TarInfo("./var/lib/dpkg/status")
    member.size = len(status)
    archive.addfile(member, io.BytesIO(status))
"""


def status(**versions: str) -> str:
    return "\n".join(f"Package: {name}\nVersion: {v}\n" for name, v in versions.items())


class Debian:
    """What the mirrors and the snapshot service have, and what was asked of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        (folder / "mmdebstrap").write_text(MMDEBSTRAP)
        (folder / "mmdebstrap").chmod(0o755)
        self.mirror(bash="1", dash="1")

    def mirror(self, **versions: str) -> None:
        (self.folder / "mirror").write_text(status(**versions))

    def snapshot(self, **versions: str) -> None:
        (self.folder / "snapshot").write_text(status(**versions))

    def asked(self) -> list[str]:
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def debian(tmp_path, monkeypatch) -> Debian:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv(SNAPSHOT_VARIABLE, "http://127.0.0.1:9/archive")  # nobody listens
    return Debian(tmp_path / "bin")


@pytest.fixture
def recipe(tmp_path, debian) -> Recipe:
    """A recipe whose lock names bash 1 and dash 1, the mirrors' present state."""
    folder = tmp_path / "containers/tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        'platform = "linux/amd64"\npython = "3.11"\nglibc = "2.36"\n'
    )
    (folder / "base.packages").write_text("bash\ndash # small\n")
    recipe = Recipe("tiny", tmp_path, {"base.lock": folder / "base.lock"})
    lock_base(recipe, ImageStore(tmp_path / "locking"))
    return recipe


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def snapshot_service(monkeypatch):
    """One that has every state."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(SNAPSHOT_VARIABLE, f"http://127.0.0.1:{server.server_port}/archive/")
    yield
    server.shutdown()
    server.server_close()


def test_base_made_anew_from_the_same_versions_is_the_locked_one(recipe, store, debian):
    base = ensure_base(recipe, store)
    assert base.sha256 == json.loads((recipe.folder / "base.lock").read_text())["sha256"]
    assert base.packages == {"bash": "1", "dash": "1"}
    assert image_identity(recipe, base)["base"] == "locked"


def test_base_in_the_store_is_taken_whatever_the_mirrors_have(recipe, store, debian):
    before = ensure_base(recipe, store)
    debian.mirror(bash="2", dash="1")
    num_asked = len(debian.asked())
    assert ensure_base(recipe, store) == before
    assert len(debian.asked()) == num_asked


def test_base_moved_mirror_names_the_packages_and_is_unlocked(recipe, store, debian, capsys):
    debian.mirror(bash="2", zsh="1")
    base = ensure_base(recipe, store)
    assert base.moved == ["bash 1 -> 2", "dash 1 -> -", "zsh - -> 1"]
    said = capsys.readouterr().err
    assert all(f"  {line}\n" in said for line in base.moved)
    assert image_identity(recipe, base)["base"] == "unlocked"
    # Remembered: the next build takes the same one, also when the mirrors move again.
    debian.mirror(bash="3", zsh="1")
    assert ensure_base(recipe, store) == base


def test_base_of_the_same_packages_in_other_bytes_is_unlocked(recipe, store, debian):
    (debian.folder / "mirror").write_text(status(bash="1", dash="1") + "\n")
    base = ensure_base(recipe, store)
    assert (base.moved, base.is_locked) == (["other bytes"], False)


def test_base_moved_mirror_is_made_from_a_snapshot_of_the_locks_time(
    recipe, store, debian, snapshot_service
):
    debian.mirror(bash="2", dash="1")
    debian.snapshot(bash="1", dash="1")
    base = ensure_base(recipe, store)
    assert base.is_locked
    lock = json.loads((recipe.folder / "base.lock").read_text())
    assert base.sha256 == lock["sha256"]
    last = debian.asked()[-1]
    assert f"/archive/debian/{lock['snapshot']} bookworm main" in last
    assert f"/archive/debian-security/{lock['snapshot']} bookworm-security main" in last


def test_base_snapshot_of_other_versions_is_not_taken(recipe, store, debian, snapshot_service):
    debian.mirror(bash="2", dash="1")
    debian.snapshot(bash="1.5", dash="1")
    base = ensure_base(recipe, store)
    assert base.moved == ["bash 1 -> 2"]


def test_base_snapshot_that_fails_half_way_does_not_end_the_build(
    recipe, store, debian, snapshot_service, capsys
):
    debian.mirror(bash="2", dash="1")  # The snapshot has nothing, and mmdebstrap fails.
    base = ensure_base(recipe, store)
    assert base.moved == ["bash 1 -> 2"]
    assert "mmdebstrap failed with exit code 1" in capsys.readouterr().err


def test_base_damaged_in_the_store_is_refused(recipe, store):
    base = ensure_base(recipe, store)
    base.file.write_bytes(base.file.read_bytes()[:-1] + b"x")
    with pytest.raises(PostTrainingError, match="not what its name says"):
        ensure_base(recipe, store)


def test_base_without_a_lock_is_refused_with_the_command(recipe, store):
    (recipe.folder / "base.lock").unlink()
    with pytest.raises(UsageError, match=r"not locked\nhint: `post-training image lock tiny`"):
        ensure_base(recipe, store)


def test_base_lock_of_another_package_list_is_refused(recipe, store):
    (recipe.folder / "base.packages").write_text("bash\n")
    with pytest.raises(UsageError, match="include is bash dash, the recipe asks for bash\n"):
        ensure_base(recipe, store)


def test_base_failed_bootstrap_leaves_nothing(recipe, store, debian):
    (debian.folder / "mirror").unlink()
    with pytest.raises(PostTrainingError, match="mmdebstrap failed"):
        ensure_base(recipe, store)
    assert list((store.folder / "bases").iterdir()) == []


@pytest.fixture
def foreign(recipe, debian) -> Recipe:
    """A recipe for another processor, of a base of its own with Python 3.11.2-1."""
    other = "linux/amd64" if platform.machine() == "aarch64" else "linux/arm64"
    native = "linux/arm64" if platform.machine() == "aarch64" else "linux/amd64"
    settings = 'platform = "{}"\npython = "3.11"\nglibc = "2.36"\n'
    (recipe.folder / "recipe.toml").write_text(settings.format(native))
    (recipe.folder / "Dockerfile").write_text("FROM scratch\n")
    folder = recipe.folder.with_name("foreign")
    folder.mkdir()
    (folder / "recipe.toml").write_text(settings.format(other))
    (folder / "base.packages").write_text("bash\n")
    (folder / "Dockerfile").write_text("FROM scratch\nADD native.tar /\n")
    debian.mirror(**{"python3.11-minimal": "3.11.2-1"})
    made = Recipe("foreign", recipe.repository, {"base.lock": folder / "base.lock"})
    lock_base(made, ImageStore(recipe.repository / "locking"))
    return made


def test_native_root_of_a_foreign_image_is_another_recipes_base(foreign, recipe, store, debian):
    base = ensure_base(foreign, store)
    assert debian.asked()[-1].startswith("--quiet --variant=minbase --architectures=")
    assert foreign.settings.platform.removeprefix("linux/") in debian.asked()[-1]
    debian.mirror(**{"python3.11-minimal": "3.11.2-1+b2"})  # rebuilt for this processor alone
    lock_base(recipe, ImageStore(recipe.repository / "locking"))
    native = ensure_native_root(foreign, base, store)
    lock = json.loads((recipe.folder / "base.lock").read_text())
    assert native == store.folder / f"bases/sha256-{lock['sha256']}.tar"


def test_native_root_with_another_python_is_refused(foreign, recipe, store, debian):
    base = ensure_base(foreign, store)
    debian.mirror(**{"python3.11-minimal": "3.11.2-2"})
    lock_base(recipe, ImageStore(recipe.repository / "locking"))
    with pytest.raises(UsageError, match=r"has Python 3\.11\.2-1, tiny's has 3\.11\.2-2"):
        ensure_native_root(foreign, base, store)


def test_native_root_is_made_only_where_the_dockerfile_asks_for_it(recipe, store):
    base = ensure_base(recipe, store)
    (recipe.folder / "Dockerfile").write_text("FROM scratch\n")
    assert ensure_native_root(recipe, base, store) is None
