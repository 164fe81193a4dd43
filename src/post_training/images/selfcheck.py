"""`python -m post_training.images.selfcheck [FOLDER]`: the last step of a build, inside the image.

Versions must equal the locks, everything in imports.txt must import, and what recipe.toml leaves to
the base must not be installed over it. FOLDER has these files; /etc/post-training unless given. The
Python that runs it is that of the environment which is checked.
"""

import contextlib
import ctypes
import importlib.util
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import post_training
from post_training.core.errors import tell

CONFIGURATION = Path("/etc/post-training")
_COMPILED_LOCK = "compiled.lock"


def locked_versions(lock: str) -> dict[str, str]:
    """{name: version} of the `name==version` lines in the text of a lock."""
    return dict(re.findall(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", lock, re.MULTILINE))


def named_modules(text: str) -> list[str]:
    """The entries of imports.txt: `module`, or `module:name` for a name that it must have, or
    `module needs LIBRARY`.

    `post_training.PACKAGE.*` becomes all public modules of that package.
    """
    modules = []
    for name in (line.strip() for line in text.splitlines()):
        if "*" in name:
            root = Path(post_training.__file__).parents[1]
            found = sorted(root.glob(f"{name.replace('.', '/')[:-1]}[!_]*.py"))
            modules += [".".join(path.relative_to(root).with_suffix("").parts) for path in found]
        elif name and not name.startswith("#"):
            modules.append(name)
    return modules


def load_named(entry: str) -> None:
    """Import `module`; of `module:name`, also look up the name, which may be dotted.

    Of `module needs LIBRARY`, where the dynamic linker has no such library, only find the module.
    """
    entry, _, library = entry.partition(" needs ")
    module, _, name = entry.partition(":")
    if library and not _can_be_loaded(library):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)


def _can_be_loaded(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def replaced_packages(without: list[str], environment: Path) -> list[str]:
    """Those of `without` that are installed in `environment`, over the base's own."""
    folders = [str(folder) for folder in environment.glob("lib/python3.*/site-packages")]
    installed = {d.name.lower().replace("_", "-") for d in metadata.distributions(path=folders)}
    return sorted(installed & set(without))


def version_faults(configuration: Path) -> list[str]:
    """A line for each package whose installed version is not that of the locks in this folder."""
    faults = []
    for lock in sorted(configuration.glob("*.lock")):
        for name, version in locked_versions(lock.read_text()).items():
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                installed = "nothing"
            if installed != version:
                faults.append(f"{name}: {lock.name} has {version}, installed is {installed}")
    return faults


def compiled_modules(configuration: Path) -> list[str]:
    """The modules of what compiled.lock names: compiled code that does not fit torch fails here."""
    lock = configuration / _COMPILED_LOCK
    names = locked_versions(lock.read_text()) if lock.exists() else {}
    modules = []
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):  # `version_faults` names it.
            modules += (metadata.distribution(name).read_text("top_level.txt") or "").split()
    return modules


def main() -> int:
    """Print every fault; the exit code."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIGURATION
    wrong = version_faults(folder)
    settings = tomllib.loads((folder / "recipe.toml").read_text())
    for name in replaced_packages(settings.get("without", []), Path(sys.prefix)):
        wrong.append(f"{name}: installed, which recipe.toml forbids")
    named = named_modules((folder / "imports.txt").read_text())
    for module in [*named, *compiled_modules(folder)]:
        try:
            load_named(module)
        except Exception as error:
            wrong.append(f"import {module}: {error}")
    for line in wrong:
        tell(f"error: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
