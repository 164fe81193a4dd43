"""The inputs of a run, which must stay what they were when their fingerprints were taken.

    fingerprints taken -> the stage reads -> check -> what was made of them is kept

A file is hashed again where its identity is another, or could not be trusted (known_digests.py); so
a file that was only touched is no change.
"""

from pathlib import Path

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import fingerprint
from post_training.core.known_digests import Identity, file_identity, read_sha256


class WatchedInputs:
    """By their keys, as they stand in the configuration. Every process of a run has its own."""

    def __init__(self) -> None:
        self._inputs: dict[str, tuple[Path, str]] = {}
        self._files: dict[Path, tuple[Identity | None, str]] = {}  # None: not to be trusted

    def add(self, key: str, path: Path) -> str:
        """The fingerprint. Errors: as of `fingerprint`."""
        found = fingerprint(path, self._sha256)
        self._inputs[key] = path.absolute(), found
        return found

    def release(self, *prefixes: str) -> None:
        """Inputs whose keys begin so were read to their end: they may change from now on."""
        self._inputs = {
            key: value for key, value in self._inputs.items() if not key.startswith(prefixes)
        }

    def check(self) -> None:
        """Errors: PostTrainingError that names the file that is not what was hashed."""
        for path, known in self._inputs.values():
            try:
                if fingerprint(path, self._same_sha256) != known:
                    raise _changed(self._gone(path))
            except FileNotFoundError:
                raise _changed(path) from None

    def _gone(self, folder: Path) -> Path:
        """The first file of the folder that is not there any more."""
        return next((p for p in self._files if folder in p.parents and not p.exists()), folder)

    def _sha256(self, path: Path) -> str:
        with open(path, "rb") as file:
            digest, identity = read_sha256(file)
        self._files[path.absolute()] = identity, digest
        return digest

    def _same_sha256(self, path: Path) -> str:
        """The digest of a file that is known. Errors: PostTrainingError when it is another."""
        path = path.absolute()
        identity, known = self._files.get(path, (None, ""))
        if identity is not None and identity == file_identity(path.stat()):
            return known
        if self._sha256(path) != known:
            raise _changed(path)
        return known


def _changed(path: Path) -> PostTrainingError:
    return PostTrainingError(
        "changed after the run had taken its fingerprint",
        where=str(path),
        hint="nothing that was made from it is kept: start again when nothing writes to it",
    )
