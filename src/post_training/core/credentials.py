"""Token files: where a user keeps them, where a container has them, and what is refused.

    ~/.config/post-training/credentials/hf-token       ->  HF_TOKEN_PATH
    ~/.config/post-training/credentials/wandb-api-key  ->  WANDB_API_KEY_FILE

Each is mounted read-only and found by its path; its content is never in an environment, on a
command line or in a file of ours. A missing one is nobody's error; one that others can read is, or
one in a folder that others can write.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from post_training.core.errors import UsageError

INSIDE = Path("/run/post-training/credentials")


@dataclass(frozen=True)
class Credential:
    """path_variable: says where the file is. value_variable: holds the secret itself, where it is
    used the other way; ours never set it."""

    name: str
    path_variable: str
    value_variable: str


CREDENTIALS = (
    Credential("hf-token", "HF_TOKEN_PATH", "HF_TOKEN"),
    Credential("wandb-api-key", "WANDB_API_KEY_FILE", "WANDB_API_KEY"),
)


@dataclass(frozen=True)
class FoundCredentials:
    """mounts: for an EDF. variables: where the files are inside."""

    mounts: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


def credentials_folder(environment: Mapping[str, str]) -> Path:
    home = environment.get("HOME") or os.path.expanduser("~")
    config = environment.get("XDG_CONFIG_HOME") or f"{home}/.config"
    return Path(config) / "post-training/credentials"


def find_credentials(environment: Mapping[str, str]) -> FoundCredentials:
    """The user's token files on this host. Errors: UsageError for one that others can read."""
    folder = credentials_folder(environment)
    mounts, variables = [], []
    for credential in CREDENTIALS:
        path = folder / credential.name
        if path.exists():
            check_token_file(path)
            mounts.append(f"{path}:{INSIDE / credential.name}:ro")
            variables.append((credential.path_variable, str(INSIDE / credential.name)))
    return FoundCredentials(tuple(mounts), tuple(variables))


def check_named_files(environment: Mapping[str, str]) -> None:
    """Of the files that the environment names, those that are here. Errors: UsageError."""
    for credential in CREDENTIALS:
        path = environment.get(credential.path_variable)
        if path and Path(path).exists():
            check_token_file(Path(path))


def check_token_file(path: Path) -> None:
    """Errors: UsageError when it is no file of its owner's alone, or others may put another in its
    place."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise UsageError("not a regular file", where=str(path))
    if mode & 0o077:
        raise UsageError(
            f"others can read this token (mode {stat.S_IMODE(mode):04o})",
            where=str(path),
            hint=f"chmod 600 {path}; if others may have read it, make a new one",
        )
    for folder in {path.parent, path.resolve().parent}:
        folder_mode = folder.stat().st_mode
        if folder_mode & 0o022 and not folder_mode & stat.S_ISVTX:
            raise UsageError(
                f"others can replace the tokens in it (mode {stat.S_IMODE(folder_mode):04o})",
                where=str(folder),
                hint=f"chmod 700 {folder}",
            )
