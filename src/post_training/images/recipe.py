"""What goes into an image, and the hash of it.

`containers/NAME/` (Dockerfile, locks, package list), `entrypoints/`, `pyproject.toml` and `src/`
of one checkout, and the base. The input hash is over their contents: never a time, a commit or a
path, so the same inputs give the same bits. The build sees these files and nothing else.
"""

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from post_training import __version__
from post_training.core.errors import UsageError
from post_training.core.hashing import sha256_file, sha256_value
from post_training.images.base_lock import LOCK_NAME
from post_training.images.checkout import not_a_checkout
from post_training.images.recipe_settings import RecipeSettings, load_settings

# 2026-01-01. Every file of an image carries this time.
SOURCE_DATE_EPOCH = 1767225600
_OTHER_LOCKS = (LOCK_NAME, "system.lock")


@dataclass(frozen=True)
class Recipe:
    """A container recipe of the checkout at `repository`.

    files: {path in the build context: source}; a fixed layout, see the Dockerfile.
    """

    name: str
    repository: Path
    files: dict[str, Path]
    version: str = __version__

    @property
    def folder(self) -> Path:
        return self.repository / "containers" / self.name

    @cached_property
    def settings(self) -> RecipeSettings:
        return load_settings(self.folder)

    @property
    def locks(self) -> dict[str, Path]:
        return {name: path for name, path in self.files.items() if name.endswith(".lock")}

    @property
    def package_locks(self) -> dict[str, Path]:
        """The locks of Python packages."""
        return {name: path for name, path in self.locks.items() if name not in _OTHER_LOCKS}

    def input_hash(self, base_sha256: str) -> str:
        """Identity of what the image will hold, given its base; hexadecimal sha256."""
        return _input_hash(self.files, base_sha256)

    def stage(self, context: Path, base_sha256: str) -> str:
        """Copy the files into an empty build context, with modes that no umask can change.

        Returns the input hash of what was copied: a file may be edited while a build starts.
        """
        for name, source in self.files.items():
            target = context / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            target.chmod(0o755 if name.startswith("entrypoints/") else 0o644)
        for folder in (context, *(path for path in context.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        return _input_hash({name: context / name for name in self.files}, base_sha256)


def _input_hash(files: dict[str, Path], base_sha256: str) -> str:
    contents = {name: sha256_file(path) for name, path in files.items()}
    return sha256_value({"files": contents, "base": base_sha256, "epoch": SOURCE_DATE_EPOCH})


def load_recipe(name: str, repository: Path) -> Recipe:
    """Errors: UsageError when the checkout holds no such recipe."""
    folder = repository / "containers" / name
    if not (folder / "Dockerfile").is_file():
        known = sorted(path.parent.name for path in repository.glob("containers/*/Dockerfile"))
        if not known:
            raise not_a_checkout(repository)
        raise UsageError(
            f"no container recipe {name!r}",
            where=str(repository / "containers"),
            hint=f"there are: {', '.join(known)}",
        )
    files = {path.name: path for path in _visible_files(folder) if path.suffix != ".md"}
    files |= _tree(repository / "entrypoints", "entrypoints")
    files |= _tree(repository / "src", "project/src")
    files["project/pyproject.toml"] = repository / "pyproject.toml"
    return Recipe(name=name, repository=repository, files=dict(sorted(files.items())))


def _tree(folder: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}/{path.relative_to(folder)}": path for path in _visible_files(folder)}


def _visible_files(folder: Path) -> list[Path]:
    """Every file below, without hidden ones, bytecode and what an editable install leaves."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix != ".pyc"
        and not any(
            part.startswith(".") or part.endswith(".egg-info")
            for part in path.relative_to(folder).parts
        )
    ]
