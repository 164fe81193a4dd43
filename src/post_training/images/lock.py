"""`post-training image lock NAME`: pin everything that a recipe asks for, by version and hash.

    recipe.toml's base   ->  base.lock            digest (or the Debian packages of base.packages)
    system.in            ->  system.lock          packages of the base's distribution
    source.in            ->  source.lock          source archives
    requirements.in      ->  requirements.lock    wheels for the recipe's platform
    dev.in               ->  dev.lock             wheels that nothing of the stack needs: of tests,
                                              and what draws reports

And what `make setup` installs on the host, for every platform at once:

    pyproject.toml       ->  requirements-dev.lock

The .in files name exact versions; resolving only adds their dependencies. Versions that stand in a
lock are kept where they still fit, so locking again changes nothing by itself.
"""

import re
import tempfile
from pathlib import Path

from post_training.core.errors import ConfigError, PostTrainingError, UsageError, tell
from post_training.core.files import atomic_file
from post_training.images.base import lock_base
from post_training.images.checkout import not_a_checkout
from post_training.images.own_base import lock_own_base
from post_training.images.recipe import BASE_LOCK, SYSTEM_PACKAGES, Recipe, RecipeSettings
from post_training.images.registry import (
    TORCH_INDEX,
    leave_unresolved,
    lock_for_uv,
    lock_registry_base,
    lock_system_packages,
    read_index_settings,
    read_registry_base,
    run_uv,
)
from post_training.images.selfcheck import locked_versions
from post_training.images.site_sif import lock_site_sif
from post_training.images.store import ImageStore

TOOLS_LOCK = "requirements-dev.lock"
UV_LOCK = "uv.lock"
# The oldest that pyproject.toml allows; the lock also holds what newer ones need instead.
_TOOLS_PYTHON = "3.11"
_ORDER = ("source", "requirements", "dev")
_EXACT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[\w,-]+\])?==[^\s*,;]+(\s*;.*)?")


def lock_recipe(recipe: Recipe, store: ImageStore, base_source: str | None) -> list[str]:
    """Write every lock of the recipe; a line for all that stays unresolved, with the reason.

    base_source: where to read the base instead of its registry, see `lock_registry_base`; of a
    recipe over one of our images, that image, see `lock_own_base`.
    Errors: ConfigError for requirements without an exact version, before anything is written.
    """
    asked = [recipe.folder / f"{name}.in" for name in _ORDER]
    asked = [path for path in asked if path.exists()]
    if faults := [fault for path in asked for fault in loose_requirements(path)]:
        raise ConfigError(faults, hint="name one version with ==")
    unresolved = _lock_base(recipe, store, base_source)
    for path in asked:
        tell(f"resolving {path.name} …")
        _resolve(path, recipe)
    return unresolved


def lock_tools(repository: Path) -> Path:
    """Write the lock of the command line and of the developers' tools, for pip and as uv.lock for
    `uv sync`; the path of the first.

    Wheels only: installing a source archive would run code of its author.
    Errors: UsageError outside a checkout.
    """
    if not (repository / "pyproject.toml").exists():
        raise not_a_checkout(repository)
    target = repository / TOOLS_LOCK
    with atomic_file(target) as lock:
        # uv prefers the versions that stand in its output file.
        lock.write_text(target.read_text() if target.exists() else "")
        run_uv(
            ["--generate-hashes", "--no-annotate", "--no-header", "--only-binary", ":all:",
             "--universal", "--python-version", _TOOLS_PYTHON, "--extra", "dev",
             "--output-file", lock, "pyproject.toml"],
            cwd=repository,
        )  # fmt: skip
    lock_for_uv(repository)
    return target


def loose_requirements(path: Path) -> list[str]:
    """A line for each requirement of an .in file that is not pinned to one version."""
    faults = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.split(" #")[0].strip()
        if not text or text.startswith(("#", "-r ", "-c ")) or _EXACT.fullmatch(text):
            continue
        faults.append(f"{path}:{number}: not pinned to one version: {text}")
    return faults


def unlocked_requirements(path: Path) -> list[str]:
    """A line for each requirement of a lock that is not exact or has no hash."""
    text = path.read_text().replace("\\\n", " ")
    faults = []
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        if not _EXACT.fullmatch(words[0]):
            faults.append(f"{path}: not pinned to one version: {words[0]}")
        elif not any(word.startswith("--hash=sha256:") for word in words):
            faults.append(f"{path}: no sha256: {words[0]}")
    return faults


def _lock_base(recipe: Recipe, store: ImageStore, source: str | None) -> list[str]:
    """Write base.lock and system.lock; a line for each that stays unresolved."""
    settings = recipe.settings
    if settings.base is None:
        with store.lock():
            lock_base(recipe, store)
        return []
    if settings.is_over_ours:
        if (recipe.folder / SYSTEM_PACKAGES).exists():
            raise UsageError(
                "packages of the distribution can't be added to an image of ours",
                where=str(recipe.folder / SYSTEM_PACKAGES),
            )
        lock_own_base(recipe, source or settings.base, store)
        return []
    unresolved = []
    path = recipe.folder / BASE_LOCK
    if source and source.endswith(".sif"):
        lock_site_sif(path, Path(source), settings.platform)
        return []
    if reason := lock_registry_base(path, settings.base, settings.platform, source):
        unresolved.append(f"{path}: {reason}")
    if (recipe.folder / SYSTEM_PACKAGES).exists():
        try:
            reference = read_registry_base(path, settings.base, settings.platform)
            with tempfile.TemporaryDirectory() as working:
                lock_system_packages(recipe.folder, reference, settings.platform, Path(working))
        except PostTrainingError as error:
            leave_unresolved(recipe.folder, "the base could not be pulled and run")
            unresolved.append(f"{recipe.folder / SYSTEM_PACKAGES}: {error.problem}")
    return unresolved


def _resolve(asked: Path, recipe: Recipe) -> None:
    """Write the lock of one .in file, with uv."""
    settings = recipe.settings
    platform = f"{settings.architecture}-manylinux_{settings.glibc.replace('.', '_')}"
    target = asked.with_suffix(".lock")
    if asked.stem == "source":
        options = ["--no-deps", "--no-binary", ":all:"]
    else:
        options = _wheels_only(asked, settings)
    if "+cpu" in asked.read_text() and "UV_FIND_LINKS" not in read_index_settings():
        options += ["--extra-index-url", TORCH_INDEX, "--index-strategy", "unsafe-best-match"]
    with tempfile.TemporaryDirectory() as temporary, atomic_file(target) as lock:
        # uv prefers the versions that stand in its output file.
        lock.write_text(_preferred_versions(target, settings, recipe.folder.parent))
        if settings.without:
            excluded = Path(temporary) / "without.txt"
            excluded.write_text("\n".join(settings.without))
            options += ["--excludes", excluded]
        run_uv(
            ["--generate-hashes", "--no-annotate", "--no-header",
             "--python-version", settings.python,
             "--python-platform", platform,
             *options, "--output-file", lock, asked.name],
            cwd=recipe.folder,
        )  # fmt: skip


def _wheels_only(asked: Path, settings: RecipeSettings) -> list[str | Path]:
    """uv's options. Packages of source.in are resolved with the rest and left out of this lock."""
    options: list[str | Path] = ["--only-binary", ":all:"]
    source = asked.with_name("source.in")
    for name in locked_versions(source.read_text()) if source.exists() else ():
        options += ["--no-binary", name, "--no-emit-package", name]
    return options


def _preferred_versions(lock: Path, settings: RecipeSettings, recipes: Path) -> str:
    """`name==version` lines: those of this lock, replaced by those of the recipe that it follows.

    recipes: the folder of all recipes.
    """
    versions = locked_versions(lock.read_text()) if lock.exists() else {}
    if settings.versions_from:
        for other in sorted((recipes / settings.versions_from).glob("*.lock")):
            if other.name != BASE_LOCK:
                versions |= locked_versions(other.read_text())
    return "".join(f"{name}=={v.split('+')[0]}\n" for name, v in sorted(versions.items()))
