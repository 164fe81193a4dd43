"""What git says about the checkout that an image was built from or a development run mounts."""

import subprocess
from pathlib import Path
from typing import Any


def describe_checkout(repository: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"}, or None outside git."""
    commit = _git(repository, "rev-parse", "HEAD")
    return commit and {"commit": commit, "dirty": bool(_git(repository, "status", "--porcelain"))}


def describe_changes(repository: Path) -> dict[str, Any]:
    """{"commit", "diff", "untracked"}: enough to make the checkout's sources again by hand."""
    return {
        "commit": _git(repository, "rev-parse", "HEAD"),
        "diff": _git(repository, "diff", "HEAD"),
        "untracked": (_git(repository, "ls-files", "-o", "--exclude-standard") or "").splitlines(),
    }


def _git(repository: Path, *words: str) -> str | None:
    """git's stdout, or None where it fails: no repository, no git, no commit yet."""
    try:
        done = subprocess.run(
            # The owner of a shared checkout is often another user; reading it is harmless.
            ["git", "-c", "safe.directory=*", "-C", repository, *words],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
