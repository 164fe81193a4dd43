"""The self-check inside the image, on a root file system that the test makes."""

from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.doctor import (
    check_credentials,
    check_network,
    check_storage,
    check_writable,
)
from post_training.images.selfcheck import version_faults

ALPS = {
    "POST_TRAINING_SITE": "clariden", "POST_TRAINING_NETWORK_PROFILE": "alps-cscs",
    "NCCL_NET": "AWS Libfabric", "NCCL_PROTO": "^LL128", "NCCL_SOCKET_IFNAME": "hsn",
    "LD_LIBRARY_PATH": "/opt/plugin",
}  # fmt: skip


@pytest.fixture
def root(tmp_path) -> Path:
    """A node of Alps, in what the check looks at."""
    for name in ("opt/plugin/libnccl-net.so", "usr/lib64/libfabric.so.1", "dev/cxi0"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sys/class/net/hsn0").mkdir(parents=True)
    return tmp_path


def wrong_lines(findings) -> list[str]:
    return [finding.text for finding in findings if finding.status == "wrong"]


def test_network_whole_node_has_nothing_wrong(root):
    findings = list(check_network(ALPS, root))
    assert wrong_lines(findings) == []
    assert "plugin of NCCL or RCCL for libfabric: /opt/plugin/libnccl-net.so" in [
        finding.text for finding in findings
    ]


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("opt/plugin/libnccl-net.so", "NCCL_NET asks for the libfabric plugin, and there is none"),
        ("usr/lib64/libfabric.so.1", "no libfabric in the container"),
        ("dev/cxi0", "no Slingshot device (/dev/cxi*)"),
        ("sys/class/net/hsn0", "NCCL_SOCKET_IFNAME names hsn, and there is only"),
    ],
)
def test_network_what_is_missing_is_said_plainly(root, gone, told):
    path = root / gone
    path.rmdir() if path.is_dir() else path.unlink()
    [line] = wrong_lines(check_network(ALPS, root))
    assert line.startswith(told)


def test_network_without_profile_or_with_ll128_is_wrong(root):
    assert wrong_lines(check_network({}, root)) == ["POST_TRAINING_NETWORK_PROFILE is not set"]
    [line] = wrong_lines(check_network({**ALPS, "NCCL_PROTO": "LL128"}, root))
    assert "must be ^LL128 on Alps" in line


def test_network_of_one_machine_needs_no_fabric(tmp_path):
    assert wrong_lines(check_network({"POST_TRAINING_NETWORK_PROFILE": "none"}, tmp_path)) == []


def test_credentials_are_told_by_path_and_never_shown(tmp_path):
    token = tmp_path / "token"
    token.write_text("hf_planted")
    token.chmod(0o600)
    findings = list(check_credentials({"HF_TOKEN_PATH": str(token), "WANDB_API_KEY": "planted"}))
    text = "\n".join(f"{finding.text} {finding.hint}" for finding in findings)
    assert "planted" not in text
    assert f"hf-token: {token}, readable by its owner alone" in text
    assert "wandb-api-key: none" in text
    assert "WANDB_API_KEY is set: the secret itself is in the environment" in text
    token.chmod(0o644)
    with pytest.raises(UsageError, match="others can read this token"):
        list(check_credentials({"HF_TOKEN_PATH": str(token)}))


def test_storage_folder_that_cannot_be_written_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wrong_lines(check_storage({"HF_HOME": str(tmp_path / "new/cache")})) == []
    [line] = wrong_lines(check_writable("scratch", Path("/proc/nothing")))
    assert line.startswith("scratch: cannot be written: /proc/nothing")
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


def test_version_faults_names_what_differs_from_the_lock(tmp_path):
    (tmp_path / "requirements.lock").write_text("pydantic==0.0.1 \\\n  --hash=x\nnot-there==1\n")
    first, second = version_faults(tmp_path)
    assert first.startswith("pydantic: requirements.lock has 0.0.1, installed is 2.")
    assert second == "not-there: requirements.lock has 1, installed is nothing"
