"""The scripts that several Dockerfiles run, as far as they do something without a build."""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[3] / "containers/steps"


def recorded(content: bytes) -> str:
    """As a wheel's RECORD has it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return f"sha256={digest},{len(content)}"


@pytest.fixture
def environment(tmp_path) -> Path:
    """Two packages that share one file, installed as pip does: the second wrote it last."""
    packages = tmp_path / "lib/python3.11/site-packages"
    for name in ("one", "two"):
        files = {f"{name}.py": b"same", "build_backend.py": name.encode()}
        info = packages / f"{name}-1.dist-info"
        info.mkdir(parents=True)
        lines = [f"{path},{recorded(content)}" for path, content in files.items()]
        lines += [f"{name}-1.dist-info/RECORD,,", f"__pycache__/{name}.cpython-311.pyc,,"]
        (info / "RECORD").write_text("\n".join(lines) + "\n")
        for path, content in files.items():
            (packages / path).write_bytes(content)
    return tmp_path


def check_files(environment: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, STEPS / "check-files", environment / "wheels"],
        env={**os.environ, "VIRTUAL_ENV": str(environment)},
        capture_output=True,
        text=True,
    )


def test_check_files_names_a_file_that_another_wheel_overwrote(environment):
    done = check_files(environment)
    packages = environment / "lib/python3.11/site-packages"
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {packages}/build_backend.py: other bytes than its wheel has (one-1, two-1)",
        "7 files, 1 of them are not as in their wheel",
    ]


def test_check_files_takes_what_wheels_share_in_equal_bytes_and_names_what_is_missing(environment):
    packages = environment / "lib/python3.11/site-packages"
    record = packages / "one-1.dist-info/RECORD"
    record.write_text(record.read_text().replace(recorded(b"one"), recorded(b"two")))
    done = check_files(environment)
    assert (done.returncode, done.stderr) == (
        0,
        "7 files, 0 of them are not as in their wheel\n",
    )
    (packages / "two.py").unlink()
    done = check_files(environment)
    assert done.returncode == 1
    assert f"error: {packages}/two.py: missing (two-1)\n" in done.stderr


def test_check_files_takes_a_file_of_a_wheel_whose_own_record_is_wrong(environment):
    """As pynvvideocodec 2.0.4 is; the bytes of another package are still a fault."""
    (environment / "wheels").mkdir()
    shared = environment / "lib/python3.11/site-packages/build_backend.py"
    for name, content in (("one", b"one"), ("two", b"changed after its RECORD was written")):
        with zipfile.ZipFile(environment / f"wheels/{name}-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("build_backend.py", content)
    done = check_files(environment)
    assert done.returncode == 1
    (environment / "lib/python3.11/site-packages/one-1.dist-info/RECORD").write_text("")
    shared.write_bytes(b"changed after its RECORD was written")
    done = check_files(environment)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        0,
        "note: two-1-py3-none-any.whl: its RECORD is wrong on build_backend.py",
    )


def test_check_files_leaves_out_bytecode(environment):
    """numpy's wheel brings one file of it, which pip compiles anew."""
    packages = environment / "lib/python3.11/site-packages"
    (packages / "one.pyc").write_bytes(b"compiled here")
    record = packages / "one-1.dist-info/RECORD"
    record.write_text(f"one.py,{recorded(b'same')}\none.pyc,{recorded(b'in the wheel')}\n")
    (packages / "two-1.dist-info/RECORD").write_text("")
    assert check_files(environment).returncode == 0
