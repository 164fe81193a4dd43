"""Compare two root file systems: the paths that differ, first in order of their names."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from post_training.core.hashing import sha256_file

_KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFLNK: "link",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def differing_paths(first: Path, second: Path, below: str = "") -> Iterator[str]:
    """`path: what differs` for every path whose kind, mode, owner, time or content differs."""
    ours, theirs = _entries(first / below), _entries(second / below)
    for name in sorted(ours.keys() | theirs.keys()):
        path = f"{below}/{name}" if below else name
        if name not in ours or name not in theirs:
            yield f"{path}: only in the {'first' if name in ours else 'second'}"
            continue
        if what := _difference(first / path, second / path, ours[name], theirs[name]):
            yield f"{path}: {what}"
        if stat.S_ISDIR(ours[name].st_mode) and stat.S_ISDIR(theirs[name].st_mode):
            yield from differing_paths(first, second, path)


def _entries(folder: Path) -> dict[str, os.stat_result]:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def _difference(
    first: Path, second: Path, ours: os.stat_result, theirs: os.stat_result
) -> str | None:
    our_kind, their_kind = stat.S_IFMT(ours.st_mode), stat.S_IFMT(theirs.st_mode)
    if our_kind != their_kind:
        return f"{_KINDS[our_kind]}, then {_KINDS[their_kind]}"
    for what, one, other in (
        ("mode", stat.filemode(ours.st_mode), stat.filemode(theirs.st_mode)),
        ("owner", f"{ours.st_uid}:{ours.st_gid}", f"{theirs.st_uid}:{theirs.st_gid}"),
        ("time", int(ours.st_mtime), int(theirs.st_mtime)),
    ):
        if one != other:
            return f"{what} is {one}, then {other}"
    if our_kind == stat.S_IFLNK and first.readlink() != second.readlink():
        return f"link to {first.readlink()}, then to {second.readlink()}"
    if our_kind == stat.S_IFREG:
        if ours.st_size != theirs.st_size:
            return f"{ours.st_size} bytes, then {theirs.st_size}"
        if sha256_file(first) != sha256_file(second):
            return "content"
    return None
