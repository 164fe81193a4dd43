"""What a build downloads, by the real pip and uv from an index that the test makes."""

import io
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import sha256_file
from post_training.images.base import ensure_wheels
from post_training.images.recipe import Recipe
from post_training.images.registry import download
from post_training.images.store import ImageStore

# No metadata can be had from it where torch is not installed, and none is asked for.
SETUP = "import torch\nraise AssertionError('nothing of an archive is run on this side')\n"
SOURCE = {
    "tiny-1/PKG-INFO": "Metadata-Version: 2.2\nName: tiny\nVersion: 1\n",
    "tiny-1/setup.py": SETUP,
    "tiny-1/pyproject.toml": (
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    ),
}


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder with a setuptools wheel and a source archive; pip looks nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "setuptools-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("setuptools/__init__.py", "")
        wheel.writestr(
            "setuptools-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: setuptools\nVersion: 1"
        )
        wheel.writestr("setuptools-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("setuptools-1.dist-info/RECORD", "")
    write_source(folder / "tiny-1.tar.gz", SOURCE)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def write_source(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))


def recipe(repository: Path, **locks: str) -> Recipe:
    folder = repository / "containers/tiny"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(
        'platform = "linux/amd64"\npython = "3.11"\nglibc = "2.36"\n'
    )
    files = {f"{name}.lock": folder / f"{name}.lock" for name in locks}
    for name, text in locks.items():
        files[f"{name}.lock"].write_text(text)
    return Recipe("tiny", repository, files)


def locked(requirement: str, file: Path) -> str:
    return f"{requirement} --hash=sha256:{sha256_file(file)}\n"


def test_wheels_hold_the_locked_wheels_and_source_archives(index, tmp_path):
    setuptools, tiny = sorted(index.iterdir())
    both = recipe(
        tmp_path / "recipe",
        requirements=locked("setuptools==1", setuptools),
        source=locked("tiny==1", tiny),
    )
    found = ensure_wheels(both, ImageStore(tmp_path / "store"))
    expected = {path.name: sha256_file(path) for path in (setuptools, tiny)}
    assert {path.name: sha256_file(path) for path in found.iterdir()} == expected


def test_wheels_of_a_changed_lock_keep_what_is_still_locked_and_nothing_else(index, tmp_path):
    """What is there is not downloaded again, unless it is damaged."""
    setuptools, tiny = sorted(index.iterdir())
    store = ImageStore(tmp_path / "store")
    wheel, source = locked("setuptools==1", setuptools), locked("tiny==1", tiny)
    first = ensure_wheels(recipe(tmp_path / "first", requirements=wheel, source=source), store)
    kept = (first / setuptools.name).stat().st_ino
    again = recipe(tmp_path / "again", requirements=f"# more\n{wheel}")
    found = ensure_wheels(again, store)
    assert [path.name for path in found.iterdir()] == [setuptools.name]
    assert (found / setuptools.name).stat().st_ino == kept
    assert not first.exists()

    (found / setuptools.name).write_bytes(b"damaged")
    anew = ensure_wheels(recipe(tmp_path / "anew", requirements=wheel), store)
    assert sha256_file(anew / setuptools.name) == sha256_file(setuptools)


def test_wheels_source_archive_of_a_local_version_has_its_own_name(index, tmp_path, monkeypatch):
    """In an index's addresses its `+` is written %2B."""
    local = {
        name.replace("tiny-1", "tiny-1+cpu"): text.replace("Version: 1\n", "Version: 1+cpu\n")
        for name, text in SOURCE.items()
    }
    page = tmp_path / "simple/tiny"
    page.mkdir(parents=True)
    archive = tmp_path / "tiny-1+cpu.tar.gz"
    write_source(archive, local)
    (page / "index.html").write_text('<a href="../../tiny-1%2Bcpu.tar.gz">tiny-1+cpu.tar.gz</a>')
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    asked = recipe(tmp_path / "recipe", source=locked("tiny==1+cpu", archive))
    found = ensure_wheels(asked, ImageStore(tmp_path / "store"))
    assert [path.name for path in found.iterdir()] == [archive.name]


def test_download_ends_where_the_other_side_says_nothing(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/tiny-1.tar.gz"
        with pytest.raises(
            PostTrainingError, match=r"tiny-1.tar.gz: cannot be downloaded: .*timed"
        ):
            download(address, tmp_path / "tiny-1.tar.gz", set(), timeout_s=0.1)
    assert list(tmp_path.iterdir()) == []


def test_wheels_source_archive_of_another_hash_is_refused_and_nothing_kept(index, tmp_path):
    setuptools, _ = sorted(index.iterdir())
    both = recipe(
        tmp_path / "recipe",
        requirements=locked("setuptools==1", setuptools),
        source=f"tiny==1 --hash=sha256:{'0' * 64}\n",
    )
    store = ImageStore(tmp_path / "store")
    with pytest.raises(PostTrainingError, match="which is not locked"):
        ensure_wheels(both, store)
    assert list((store.folder / "wheels/tiny").glob("*")) == []


def test_wheels_source_archive_in_a_lock_of_wheels_is_refused(index, tmp_path):
    _, tiny = sorted(index.iterdir())
    wrong = recipe(tmp_path / "recipe", requirements=locked("tiny==1", tiny))
    with pytest.raises(PostTrainingError, match="No matching distribution found for tiny==1"):
        ensure_wheels(wrong, ImageStore(tmp_path / "store"))
