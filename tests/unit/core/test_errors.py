import errno
import io
import os

import pytest

from post_training.core.errors import (
    ConfigError,
    Interrupted,
    PostTrainingError,
    UsageError,
    report,
)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PostTrainingError("it broke"), 1, "error: it broke\n"),
        (UsageError("no", where="x.toml", hint="yes"), 2, "error: x.toml: no\nhint: yes\n"),
        (ConfigError(["a: 1", "b: 2"], hint="h"), 2, "error: a: 1\nerror: b: 2\nhint: h\n"),
        (Interrupted("SIGTERM", 15), 143, "error: stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/x"), 1, "error: /x: no such file\n"),
    ],
)
def test_report_prints_one_clear_text_and_returns_the_code(error, code, text):
    stream = io.StringIO()
    assert report(error, stream) == code
    assert stream.getvalue() == text


def test_report_full_disk_has_a_hint():
    stream = io.StringIO()
    report(OSError(errno.ENOSPC, "No space left on device", "/x"), stream)
    assert stream.getvalue().startswith("error: /x: no space left on device\nhint: free some space")


def test_report_read_only_file_system_says_what_can_be_written():
    stream = io.StringIO()
    report(OSError(errno.EROFS, "Read-only file system", "/root/out"), stream)
    error, hint = stream.getvalue().splitlines()
    assert error == "error: /root/out: read-only file system"
    assert hint.startswith("hint: in an image only what is mounted can be written")


def test_report_of_a_working_folder_that_is_gone_says_so(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    stream = io.StringIO()
    with pytest.raises(FileNotFoundError) as raised:
        os.getcwd()
    assert report(raised.value, stream) == 1
    assert stream.getvalue().startswith("error: the working folder was removed\nhint: `cd` to a ")


def test_report_raises_our_own_bugs():
    with pytest.raises(ZeroDivisionError):
        report(ZeroDivisionError(), io.StringIO())


def test_interrupted_is_not_taken_for_a_fault_of_what_was_interrupted():
    with pytest.raises(Interrupted):
        try:
            raise Interrupted("SIGTERM", 15)
        except Exception as error:
            raise PostTrainingError("a library failed") from error
