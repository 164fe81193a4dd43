"""containers/NAME/recipe.toml: what a recipe is for, and what its packages are resolved for.

platform = "linux/arm64"            of the image
python = "3.12"                     the interpreter of its environment
glibc = "2.39"                      the newest manylinux tag that it takes
base = "REGISTRY/NAME:TAG"          left out: bootstrapped from base.packages
versions_from = "cpu"               prefer the versions in that recipe's locks
without = ["torchvision"]           never installed: useless, or the base's own
"""

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, UsageError

SETTINGS_NAME = "recipe.toml"
_ARCHITECTURES = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}
# What manylinux tags there were before they were named for glibc's version.
_OLD_TAGS = {"x86_64": ("2014", "2010", "1"), "aarch64": ("2014",)}
_FIRST_GLIBC_MINOR = {"x86_64": 5, "aarch64": 17}


@dataclass(frozen=True)
class RecipeSettings:
    platform: str
    python: str
    glibc: str
    base: str | None = None
    versions_from: str | None = None
    without: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """As wheels and kernels call it."""
        return _ARCHITECTURES[self.platform]

    @property
    def wheel_platforms(self) -> list[str]:
        """The platform tags of wheels that run there, the newest first."""
        newest, oldest = int(self.glibc.split(".")[1]), _FIRST_GLIBC_MINOR[self.architecture]
        tags = [f"manylinux_2_{minor}" for minor in range(newest, oldest - 1, -1)]
        tags += [f"manylinux{year}" for year in _OLD_TAGS[self.architecture]]
        return [f"{tag}_{self.architecture}" for tag in tags]


def load_settings(folder: Path) -> RecipeSettings:
    """Errors: UsageError when there is none; ConfigError with every fault."""
    path = folder / SETTINGS_NAME
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError("no such file", where=str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    if faults := [f"{path}: {fault}" for fault in _faults(data)]:
        raise ConfigError(faults)
    return RecipeSettings(**{**data, "without": tuple(data.get("without", ()))})


def _faults(data: dict[str, Any]) -> list[str]:
    known = [field.name for field in fields(RecipeSettings)]
    faults = [f"{key}: unknown key (known: {', '.join(known)})" for key in data if key not in known]
    for key in ("platform", "python", "glibc"):
        if key not in data:
            faults.append(f"{key}: missing")
    for key in known:
        value = data.get(key, "" if key != "without" else [])
        words = value if key == "without" else [value]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            faults.append(f"{key}: must be {'a list of names' if key == 'without' else 'a text'}")
    if faults:
        return faults
    if data["platform"] not in _ARCHITECTURES:
        known_platforms = ", ".join(_ARCHITECTURES)
        faults.append(f"platform: must be one of {known_platforms} (got {data['platform']!r})")
    for key, pattern in (("python", r"3\.\d+"), ("glibc", r"2\.\d+")):
        if not re.fullmatch(pattern, data[key]):
            faults.append(f"{key}: must be like {pattern.replace(chr(92), '')} (got {data[key]!r})")
    return faults
