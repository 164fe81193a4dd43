"""Run inside the image as the last build step: versions equal the locks, everything that
imports.txt names imports, and what recipe.toml leaves to the base was not installed over it.
"""

import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import post_training

CONFIGURATION = Path("/etc/post-training")
ENVIRONMENT = Path("/opt/post-training/venv")


def locked_versions(lock: str) -> dict[str, str]:
    """{name: version} of the `name==version` lines of a requirements file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, flags=re.MULTILINE))


def named_modules(text: str) -> list[str]:
    """The modules of imports.txt. `post_training.stages.*`: all in that package. `module:name` stays
    as it is: a name that the module must have."""
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
    """Import a module; of `module:name`, look the (dotted) name up in it."""
    module, _, name = entry.partition(":")
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)


def replaced_packages(without: list[str], environment: Path) -> list[str]:
    """Those of `without` that lie in our own environment."""
    folders = [str(folder) for folder in environment.glob("lib/python3.*/site-packages")]
    installed = {d.name.lower().replace("_", "-") for d in metadata.distributions(path=folders)}
    return sorted(installed & set(without))


def version_faults(configuration: Path) -> list[str]:
    """A line for each package that is not the one its lock names."""
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


def main() -> int:
    wrong = version_faults(CONFIGURATION)
    settings = tomllib.loads((CONFIGURATION / "recipe.toml").read_text())
    for name in replaced_packages(settings.get("without", []), ENVIRONMENT):
        wrong.append(f"{name}: installed, which recipe.toml forbids")
    for module in named_modules((CONFIGURATION / "imports.txt").read_text()):
        try:
            load_named(module)
        except Exception as error:
            wrong.append(f"import {module}: {error}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
