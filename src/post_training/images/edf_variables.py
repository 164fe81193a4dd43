"""Variables in an EDF: what `${NAME}` stands for.

They are the host's; in [env] they are the image's own first, so that `PATH = "${PATH}:/more"` goes
on from the image's. An empty value in [env] unsets the variable, in the image too.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError

_VARIABLE = re.compile(r"\$(\$?)(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_BANNED = re.compile(r'\$\(|`|;|"')
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
# Made of the host's value they would hide what the image has there.
_IMAGE_PATHS = ("PATH", "LD_LIBRARY_PATH")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Expand `${VAR}` and `${VAR:-default}`; `$${VAR}` and `$$VAR` are a literal `${VAR}`, `$VAR`.

    Errors: ValueError.
    """
    if "\0" in text:
        raise ValueError(f"holds a NUL character (got {text!r})")
    if banned := _BANNED.search(text):
        raise ValueError(f"{banned[0]!r} is not allowed in an EDF (got {text!r})")

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        if match[3]:
            raise ValueError(f"{match[0]!r} is not expanded by every engine: write ${{{match[3]}}}")
        name = _NAME.fullmatch(match[2])
        if name is None:
            raise ValueError(f"cannot expand {match[0]!r}")
        if name[2] is not None and "$" in name[2]:
            raise ValueError(f"a default can't hold a variable (got {match[0]!r})")
        # As in a shell, `:-` also stands in for an empty value.
        found = env.get(name[1])
        if name[2] is not None:
            return found or name[2]
        if found is None:
            raise ValueError(f"undefined variable {name[1]}")
        return found

    return _VARIABLE.sub(value, text)


def escape(text: str) -> str:
    """What `expand` turns into `text`."""
    return re.sub(r"\$(?=[{A-Za-z_])", "$$", text)


def use_variables(text: str, env: Mapping[str, str]) -> str:
    """`text` with the variables of `env` filled in, and all others left to be expanded."""

    def value(match: re.Match[str]) -> str:
        name = None if match[1] or match[2] is None else _NAME.fullmatch(match[2])
        return escape(env[name[1]]) if name and env.get(name[1]) else match[0]

    return _VARIABLE.sub(value, text)


def expand_values(
    data: Any, env: Mapping[str, str], where: str, faults: list[str], key: str = ""
) -> Any:
    """`data` with every string expanded; a string that cannot be is a fault and left as it is."""
    if isinstance(data, dict):
        return {
            name: expand_values(value, env, where, faults, f"{key}.{name}" if key else name)
            for name, value in data.items()
        }
    if isinstance(data, list):
        return [expand_values(v, env, where, faults, f"{key}[{i}]") for i, v in enumerate(data)]
    if not isinstance(data, str):
        return data
    try:
        return expand(data, env)
    except ValueError as error:
        faults.append(f"{where}: {key}: {error}")
        return data


def expand_env(
    variables: dict[str, str],
    image: str,
    env: Mapping[str, str],
    cwd: Path,
    path: Path,
    faults: list[str],
) -> dict[str, str]:
    """[env] expanded from the image's own variables and the host's, the image's first."""
    used = {
        name[1]
        for value in variables.values()
        for match in _VARIABLE.finditer(value)
        if not match[1] and match[2] and (name := _NAME.fullmatch(match[2]))
    }
    found: dict[str, str] = {}
    if used and image:
        try:
            found = _image_variables(cwd / image, variables)
        except PostTrainingError as error:
            faults += [
                f"{path}: env: {name}: what the image has there cannot be read: {error.problem}"
                for name in sorted(used & set(_IMAGE_PATHS))
            ]
    return expand_values(variables, {**env, **found}, str(path), faults, "env")


def _image_variables(image: Path, pins: Mapping[str, str]) -> dict[str, str]:
    """The variables that the image sets. Errors: PostTrainingError where they cannot be read."""
    if image.suffix == ".sif":
        record = image.with_name(f"sha256-{pins.get('POST_TRAINING_IMAGE_SQSH_SHA256')}.json")
        try:
            return dict(json.loads(record.read_text())["environment"])
        except (OSError, ValueError, KeyError, TypeError):
            raise PostTrainingError(f"no record of the SIF's variables in {record}") from None
    if not image.is_file():
        return {}  # A registry's, or none: told elsewhere.
    if shutil.which("unsquashfs") is None:
        raise PostTrainingError("unsquashfs is not installed (squashfs-tools)")
    done = subprocess.run(
        ["unsquashfs", "-cat", str(image), "etc/environment"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return _parse(done.stdout.decode(errors="replace"))


def own_variables() -> dict[str, str]:
    """The variables of the image that this process is in."""
    path = Path("/etc/environment")
    return _parse(path.read_text()) if path.exists() else {}


def _parse(text: str) -> dict[str, str]:
    """/etc/environment of an image: where enroot, and our Dockerfiles, keep the OCI ENV."""
    lines = text.splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


class EverySet(dict[str, str]):
    """An environment in which every variable is set: what cannot be expanded in it, no engine can
    expand, wherever it runs."""

    def get(self, key: str, default: Any = None) -> str:
        return "x"
