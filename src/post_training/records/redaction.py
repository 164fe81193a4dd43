"""A record without the place it is from: what an export shows of paths, hosts and people.

    below the working folder or the run's   relative to it
    what every image has (/opt, /etc, …)    as it is
    any other absolute path                 [path]/NAME
    hosts, and the owner's name             [host], [user]
    secrets of a known form                 [redacted: KIND]

Recipe and topology stay as they are: the identity is made of them.
"""

import os
import pwd
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.core.secrets import redact

# Not after a letter, a dot or a slash: no part of a relative path, of an address, of `1/2`.
_ABSOLUTE = re.compile(r"(?<![\w./~\]-])/(?![/\s])[^\s:,;'\"=\[\](){}<>|]+")
_OF_EVERY_IMAGE = ("/opt/", "/etc/", "/run/", "/usr/", "/dev/", "/proc/", "/sys/")
_HOME = re.compile(r"/(?:home|users|Users)/([\w.-]+)|/root(?=/|$)")
_KEPT = ("recipe", "topology", "identity", "packages", "seal")
_NODES = "SLURM_JOB_NODELIST"
# A shorter name is likely a word, or part of one.
_SHORTEST_NAME = 4


class Redaction:
    """places: the dotted keys of what was replaced so far."""

    def __init__(self, record: dict[str, Any], run_dir: Path):
        self.places: list[str] = []
        working = record["working_dir"].rstrip("/")
        own = {str(run_dir.absolute()), str(run_dir.resolve())}
        self._folders = sorted({working, *own} - {""}, key=len, reverse=True)
        machines = [record["machine"], *(each["machine"] for each in record["attempts"])]
        hosts = {machine.get("host", "") for machine in machines}
        hosts |= {socket.gethostname(), record["environment"].get(_NODES, "")}
        self._hosts = {name for name in hosts if name}
        owner = _owner(run_dir)
        users = {owner, os.environ.get("USER", ""), *_homes_in(record)}
        self._users = {name for name in users if name not in ("", "root")}

    def value(self, value: Any, place: str = "") -> Any:
        """A JSON value without what is told above."""
        if isinstance(value, str):
            is_name = place.endswith((".host", f".{_NODES}"))
            text = "[host]" if is_name else self.text(value)
            if text != value:
                self.places.append(place)
            return text
        if isinstance(value, dict):
            return {
                key: below
                if not place and key in _KEPT
                else self.value(below, f"{place}.{key}" if place else key)
                for key, below in value.items()
            }
        if isinstance(value, list):
            return [self.value(below, f"{place}[{index}]") for index, below in enumerate(value)]
        return value

    def text(self, text: str) -> str:
        text, _ = redact(text)
        text = _ABSOLUTE.sub(lambda found: self._path(found[0]), text)
        for names, instead in ((self._hosts, "[host]"), (self._users, "[user]")):
            for name in sorted(names, key=len, reverse=True):
                if len(name) >= _SHORTEST_NAME:
                    text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", instead, text)
        return text

    def _path(self, path: str) -> str:
        for folder in self._folders:
            if path == folder:
                return "."
            if path.startswith(f"{folder}/"):
                return path[len(folder) + 1 :]
        if path.startswith(_OF_EVERY_IMAGE):
            return path
        if _HOME.fullmatch(path):
            return "[path]"
        return f"[path]/{path.rstrip('/').rpartition('/')[2]}"


def _owner(run_dir: Path) -> str:
    try:
        return pwd.getpwuid(run_dir.stat().st_uid).pw_name
    except KeyError:  # Of another machine.
        return ""


def _homes_in(value: Any) -> Iterator[str]:
    """The names of the people whose homes are named anywhere in a record."""
    if isinstance(value, str):
        yield from (name for name in _HOME.findall(value) if name)
    elif isinstance(value, dict):
        for below in value.values():
            yield from _homes_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from _homes_in(below)
