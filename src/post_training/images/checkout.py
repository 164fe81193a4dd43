"""What git knows of a checkout: of the one an image is built from, or a development run mounts."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.core.process import run_tool
from post_training.core.secrets import redact

# git refuses to read another user's checkout unless told; shared checkouts are often another's.
_GIT = ["git", "-c", "safe.directory=*"]


def not_a_checkout(folder: Path) -> UsageError:
    """The error of a command that needs a checkout; its hint names the one it is installed from."""
    own = Path(__file__).parents[3]
    name = str(own) if (own / "containers").is_dir() else "FOLDER"
    return UsageError(
        "not a checkout of post-training",
        where=str(folder),
        hint=f"run it in a checkout, or name one: --repository {name}",
    )


def describe_checkout(repository: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"}, or None outside git."""
    commit = _git(repository, "rev-parse", "HEAD")
    return commit and {"commit": commit, "dirty": bool(_git(repository, "status", "--porcelain"))}


def describe_changes(repository: Path) -> dict[str, Any]:
    """{"commit", "diff", "untracked"}: enough to make the checkout's sources again by hand.

    Secrets are taken out of the diff; then "redacted" has their kinds.
    """
    diff, kinds = _git(repository, "diff", "HEAD"), []
    if diff:
        diff, kinds = redact(diff)
    untracked = _git(repository, "ls-files", "-o", "--exclude-standard") or ""
    return {
        "commit": _git(repository, "rev-parse", "HEAD"),
        "diff": diff,
        "untracked": untracked.splitlines(),
        **({"redacted": kinds} if kinds else {}),
    }


@contextmanager
def worktree(repository: Path, commit: str, folder: Path) -> Iterator[Path]:
    """Check out `commit` into the new `folder`; it is removed at the end.

    Errors: UsageError when the repository does not have the commit.
    """
    if not has_commit(repository, commit):
        raise UsageError(
            f"there is no commit {commit}",
            where=str(repository),
            hint="fetch it, or name the right checkout with --repository",
        )
    run_tool([*_GIT, "-C", repository, "worktree", "add", "--quiet", "--detach", folder, commit])
    try:
        yield folder
    finally:
        run_tool([*_GIT, "-C", repository, "worktree", "remove", "--force", folder])


def has_commit(repository: Path, commit: str) -> bool:
    return _git(repository, "cat-file", "-e", f"{commit}^{{commit}}") is not None


def _git(repository: Path, *words: str) -> str | None:
    """git's stdout, or None where git fails (no repository, no commit yet) or is not installed."""
    try:
        done = subprocess.run(
            [*_GIT, "-C", repository, *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
