"""Publish a model on the Hugging Face hub: its files as the run left them, and a card.

The repository then holds these files and no others, in one commit. artifact.json goes along as
`runs export` would write it: without folders, hosts and people. The token is found by the hub's own
client (HF_TOKEN, HF_TOKEN_PATH), and never shown.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import ARTIFACT_RECORD
from post_training.core.secrets import find_secret
from post_training.records.artifact import read_artifact_of_run
from post_training.records.card import CARD_NAME
from post_training.records.check import check_artifact
from post_training.records.export import show_artifact_record

_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Of the repository alone: how it keeps large files.
_OF_THE_HUB = (".gitattributes",)
# A larger file is weights, which hold no text.
_LARGEST_TEXT = 1 << 20


@dataclass(frozen=True)
class Publication:
    """What is to be published: {name: a path, or its content}."""

    repository: str
    files: dict[str, Path | bytes]
    fingerprint: str

    @classmethod
    def prepare(cls, folder: Path, repository: str, card: str) -> "Publication":
        """Read every file of the artifact, and check it.

        Errors: UsageError for a name that is none, what no run made, or a file with a secret in it;
        PostTrainingError for an artifact that is not what its run left.
        """
        if not _NAME.fullmatch(repository):
            raise UsageError(f"the repository must be ORG/NAME (got {repository})")
        artifact = read_artifact_of_run(folder)
        if found := check_artifact(folder).faults:
            told = "; ".join(found)
            raise PostTrainingError(f"is not what its run left: {told}", where=str(folder))
        files: dict[str, Path | bytes] = {
            ARTIFACT_RECORD: show_artifact_record(folder),
            **{name: folder / name for name in artifact["files"]},
            # In the place of one that the model had: it is of another model.
            CARD_NAME: card.encode(),
        }
        for name, content in files.items():
            if (kind := _secret(content)) is not None:
                raise UsageError(f"holds a secret: {kind}", where=str(folder / name))
        return cls(repository, files, artifact["fingerprint"])

    def lines(self) -> Iterator[str]:
        """Each file with its size, and all of them."""
        sizes = {name: _size(content) for name, content in sorted(self.files.items())}
        for name, size in sizes.items():
            yield f"{size:>16,} {name}"
        yield f"{sum(sizes.values()):>16,} bytes in {len(sizes)} files, for {self.repository}"

    def upload(self, *, private: bool) -> str:
        """Make the repository where it is not there, and commit; the address of the commit.

        private: of a repository that is made; one that is there stays what it is.
        Errors: UsageError without a token, or one that may not write there; PostTrainingError
        where the hub can't be reached.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

        token = get_token()
        if token is None:
            hint = "set HF_TOKEN_PATH to a file that holds it, or HF_TOKEN"
            raise UsageError("the hub takes no files without a token", hint=hint)
        api = HfApi(token=token)
        with _hub_faults(self.repository, token):
            api.create_repo(self.repository, private=private, exist_ok=True)
            there = api.list_repo_files(self.repository)
            stale = [n for n in there if n not in self.files and n not in _OF_THE_HUB]
            added = [CommitOperationAdd(name, _given(c)) for name, c in self.files.items()]
            commit = api.create_commit(
                self.repository,
                [*(CommitOperationDelete(name) for name in stale), *added],
                commit_message=f"Model of fingerprint {self.fingerprint[:16]}",
            )
        return f"{commit.commit_url}" + (f" (removed: {', '.join(stale)})" if stale else "")


def _given(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else str(content)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _secret(content: Path | bytes) -> str | None:
    if _size(content) > _LARGEST_TEXT:
        return None
    data = content if isinstance(content, bytes) else content.read_bytes()
    return find_secret(data.decode(errors="replace"))


@contextmanager
def _hub_faults(repository: str, token: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub import errors

    def told(error: Any) -> str:
        return " ".join(str(error).replace(token, "[token]").split())

    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(told(error), where=repository) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403, 404):
            raise UsageError(
                f"the hub refuses ({status}): the token may not write there",
                where=repository,
                hint="it needs the role `write`, of that organisation",
            ) from None
        raise PostTrainingError(f"the upload failed: {told(error)}", where=repository) from None
    except (OSError, httpx2.HTTPError, ValueError) as error:
        raise PostTrainingError(f"the upload failed: {told(error)}", where=repository) from None
