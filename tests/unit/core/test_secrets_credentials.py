"""Token files: found by their place, mounted by their path, refused when others can read them."""

import pytest

from post_training.core.errors import UsageError
from post_training.core.secrets import (
    FoundCredentials,
    check_named_files,
    check_token_file,
    find_credentials,
)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / ".config/post-training/credentials"
    path.mkdir(parents=True)
    return path


def test_credentials_absent_ones_are_nobodys_error(tmp_path):
    assert find_credentials({"HOME": str(tmp_path)}) == FoundCredentials()
    check_named_files({"HF_TOKEN_PATH": str(tmp_path / "none"), "WANDB_API_KEY_FILE": ""})


def test_credentials_found_are_mounted_read_only_and_named_by_path(tmp_path, folder):
    (folder / "hf-token").write_text("hf_planted")
    (folder / "hf-token").chmod(0o600)
    (folder / "other").write_text("not one of ours")
    inside = "/run/post-training/credentials/hf-token"
    found = find_credentials({"HOME": str(tmp_path)})
    assert found.mounts == (f"{folder}/hf-token:{inside}:ro",)
    assert found.variables == (("HF_TOKEN_PATH", inside),)


def test_credentials_own_configuration_folder_counts(tmp_path, folder):
    (folder / "wandb-api-key").write_text("planted")
    (folder / "wandb-api-key").chmod(0o400)
    environment = {"HOME": "/elsewhere", "XDG_CONFIG_HOME": str(tmp_path / ".config")}
    assert dict(find_credentials(environment).variables) == {
        "WANDB_API_KEY_FILE": "/run/post-training/credentials/wandb-api-key"
    }


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602, 0o666])
def test_token_file_that_others_can_read_is_refused_without_its_content(tmp_path, folder, mode):
    path = folder / "hf-token"
    path.write_text("hf_planted")
    path.chmod(mode)
    for look in (
        lambda: find_credentials({"HOME": str(tmp_path)}),
        lambda: check_named_files({"HF_TOKEN_PATH": str(path)}),
        lambda: check_token_file(path),
    ):
        with pytest.raises(UsageError, match=f"others can read this token .mode {mode:04o}") as e:
            look()
        assert "hf_planted" not in str(e.value)
        assert f"chmod 600 {path}" in e.value.hint


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o733])
def test_token_file_in_a_folder_that_others_can_write_is_refused(tmp_path, folder, mode):
    (folder / "hf-token").write_text("hf_planted")
    (folder / "hf-token").chmod(0o600)
    folder.chmod(mode)
    with pytest.raises(UsageError, match=f"others can replace the tokens in it .mode {mode:04o}"):
        find_credentials({"HOME": str(tmp_path)})
    # By a link, too.
    (tmp_path / "own").mkdir(mode=0o700)
    (tmp_path / "own/hf-token").symlink_to(folder / "hf-token")
    with pytest.raises(UsageError, match="others can replace"):
        check_token_file(tmp_path / "own/hf-token")
    folder.chmod(0o1777)
    check_token_file(folder / "hf-token")


def test_token_file_that_is_a_folder_is_refused(folder):
    with pytest.raises(UsageError, match="not a regular file"):
        check_token_file(folder)
