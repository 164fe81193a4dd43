"""`post-training doctor --ssh`, with a real agent and real keys."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from post_training.images.doctor import describe_findings
from post_training.slurm.doctor import examine_ssh


def key(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "of-a-test", "-f", str(path)]
    subprocess.run(words, check=True)
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home/.ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return tmp_path / "home"


@pytest.fixture
def agent(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # A socket's path may have about 100 characters.
    socket = Path(f"/tmp/ssh-{tmp_path.name[-20:]}-{tmp_path.stat().st_ino}")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # It listens once it says where.
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    yield socket
    process.terminate()
    process.wait()
    socket.unlink(missing_ok=True)


def test_agent_with_a_key_is_named_and_its_secret_is_not(agent, home, tmp_path):
    path = key(tmp_path / "elsewhere/key")
    subprocess.run(["ssh-add", "-q", path], check=True)
    code, text = describe_findings(examine_ssh())
    assert code == 0, text
    assert "of-a-test (ED25519)" in text
    assert "no private key lies in" in text
    assert "github.com is asked as" in text
    assert path.read_text().splitlines()[1] not in text


def test_agent_without_a_key_says_where_to_add_one(agent):
    code, text = describe_findings(examine_ssh())
    assert code == 1
    assert "is forwarded, and has no key" in text
    assert "on your own machine: ssh-add" in text


def test_no_agent_says_how_to_forward_one(home):
    code, text = describe_findings(examine_ssh())
    assert code == 1
    assert "SSH_AUTH_SOCK is not set" in text
    assert "ForwardAgent yes" in text


def test_agent_of_an_earlier_login_is_told_as_that(home, monkeypatch):
    monkeypatch.setenv("SSH_AUTH_SOCK", str(home / "gone"))
    code, text = describe_findings(examine_ssh())
    assert code == 1
    assert "the one of an earlier login, which is gone" in text


def test_private_key_that_others_can_read_is_wrong(agent, home):
    path = key(home / ".ssh/id_test")
    assert "lies on this machine" in describe_findings(examine_ssh())[1]
    path.chmod(0o644)
    code, text = describe_findings(examine_ssh())
    assert code == 1
    assert f"others can read {path} (mode 644)" in text
    assert "id_test.pub" not in text
