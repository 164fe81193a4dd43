"""Inputs that change while a run reads them."""

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import WatchedInputs, fingerprint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    for name in ("config.json", "part/weights"):
        (folder / name).write_text("abc")
    return folder


def watch(path: Path) -> WatchedInputs:
    watched = WatchedInputs()
    assert watched.add("model.path", path) == fingerprint(path)
    return watched


def test_large_file_that_an_earlier_attempt_hashed_is_not_read_again(monkeypatch, tmp_path: Path):
    """All other ranks wait for the answer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    old = Path(sys.executable).resolve()
    digest = WatchedInputs().add("model.path", old)
    assert digest == fingerprint(old)
    [entry] = (tmp_path / "cache/post-training/verified").iterdir()
    entry.write_text("0" * 64)
    later = WatchedInputs()
    assert later.add("model.path", old) == "0" * 64
    later.check()


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "other bytes of the same length": (lambda f: (f / "config.json").write_text("abd"), "config"),
    "a file more": (lambda f: (f / "chat_template.jinja").write_text("x"), "chat_template.jinja"),
    "a file less": (lambda f: (f / "part/weights").unlink(), "part/weights"),
    "another file in its place": (
        lambda f: ((f / "new").write_text("xyz"), (f / "new").rename(f / "part/weights")),
        "part/weights",
    ),
    "gone": (lambda f: f.rename(f.with_name("elsewhere")), "model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_change_of_a_folder_is_refused_with_the_name_of_the_file(change: str, folder: Path):
    watched = watch(folder)
    watched.check()
    act, name = CHANGES[change]
    act(folder)
    with pytest.raises(PostTrainingError, match="changed after the run") as error:
        watched.check()
    assert error.value.where.startswith(str(folder if name == "model" else folder / name))


def test_change_that_keeps_size_and_times_of_a_young_file_is_refused(folder: Path):
    file = folder / "config.json"
    watched, before = watch(file), file.stat()
    file.write_text("abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(PostTrainingError, match="changed after the run"):
        watched.check()


def test_file_that_was_touched_or_written_again_is_no_change(folder: Path):
    watched = watch(folder)
    os.utime(folder / "config.json", (1, 1))
    (folder / "part/weights").write_text("abc")
    watched.check()


def test_input_that_was_read_to_its_end_may_change(folder: Path):
    watched = watch(folder)
    watched.add("data.datasets[0].path", folder / "config.json")
    watched.release("model.")
    (folder / "part/weights").write_text("other")
    watched.check()
    (folder / "config.json").write_text("other")
    with pytest.raises(PostTrainingError, match="changed after the run"):
        watched.check()


def test_watch_goes_to_another_process_with_what_it_knows(folder: Path):
    watched = pickle.loads(pickle.dumps(watch(folder)))
    watched.check()
    (folder / "config.json").write_text("other")
    with pytest.raises(PostTrainingError, match="changed after the run"):
        watched.check()
