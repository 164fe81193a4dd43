"""The states of many runs, kept in one SQLite file of the user's cache folder.

A row stands for its run folder as long as the files it was read from are as they were and nothing
of the run is in Slurm's queue; any other folder is read anew. So the file may be deleted at any
time, and the next look makes it again from the folders: one that is damaged is removed, and where
none can be kept (a full disk, a file system without locks) the look is made without.

With it `runs list` of 10,000 runs takes 0.7 s, without 3.4 s: most of that is Python reading JSON,
which threads do not speed up. And by it a run that was listed once is found by its id, wherever it
is.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from post_training.config.faults import nearest
from post_training.core.errors import UsageError, tell
from post_training.core.files import user_cache
from post_training.records.run import LAUNCH_FOLDER
from post_training.records.run_record import RECORD_NAME, read_record
from post_training.slurm.outcome import TALLY_NAME
from post_training.slurm.runs import (
    STATES,
    RunState,
    add_slurm_states,
    queue_if_it_answers,
    run_state,
)
from post_training.slurm.submit import SUBMISSION_NAME

_T = TypeVar("_T")
_VERSION = 4
_COLUMNS = "path, signature, state, run_id, stage, started, image, recipe, job_ids, told"
_READ_FROM = (RECORD_NAME, f"{LAUNCH_FOLDER}/{SUBMISSION_NAME}", f"{LAUNCH_FOLDER}/{TALLY_NAME}")
# A run in or below a folder; its values: the folder's path with a slash, twice.
_BELOW = "substr(runs.path || '/', 1, length(?)) = ?"
_DIGESTS = ("oci_digest", "sqsh_sha256", "sif_sha256")
# In these a run stays until one of the files above changes, or Slurm starts it again.
_SETTLED = ("finished", "failed", "interrupted", "ended")


@dataclass(frozen=True)
class Filters:
    """What is asked of a run.

    image: how its OCI or file digest begins.
    since: of its first attempt, in UTC.
    settings: {key of the recipe: value}.
    """

    stage: str | None = None
    state: str | None = None
    image: str | None = None
    since: date | None = None
    settings: dict[str, Any] | None = None

    def where(self) -> tuple[str, list[Any]]:
        """An SQL condition and its values."""
        asked = {
            "stage = ?": self.stage,
            "state = ?": self.state,
            "image LIKE '%:' || ? || '%'": self.image and self.image.removeprefix("sha256:"),
            "started >= ?": self.since and self.since.isoformat(),
        }
        terms = [term for term, value in asked.items() if value is not None]
        values: list[Any] = [value for value in asked.values() if value is not None]
        for key, value in (self.settings or {}).items():
            place = f"$.{json.dumps(key)}"
            terms += ["json_type(recipe, ?) IS NOT NULL"]
            terms += ["json_extract(recipe, ?) IS json_extract(?, '$')"]
            values += [place, place, json.dumps(value)]
        return " AND ".join(["TRUE", *terms]), values


def list_states(folder: Path, filters: Filters) -> list[RunState]:
    """The runs in or below `folder`, by their paths. Where there are none, settings that no run
    there has are told. Errors: UsageError."""
    if filters.state not in (None, *STATES):
        raise UsageError(
            f"--state: no run can be {filters.state!r}", hint=f"there are: {', '.join(STATES)}"
        )
    root = str(folder.absolute())
    condition, values = filters.where()

    def look(index: sqlite3.Connection) -> list[tuple[str, dict[str, Any]]]:
        _refresh(index, folder)
        below = index.execute(
            f"SELECT path, told FROM runs WHERE {_BELOW} AND {condition} ORDER BY path",
            [f"{root}/", f"{root}/", *values],
        ).fetchall()
        if not below and filters.settings:
            _warn_of_unknown(index, root, filters.settings)
        return [(path, json.loads(told)) for path, told in below]

    below = _with_index(look)
    return [RunState(run_dir=folder / os.path.relpath(path, root), **told) for path, told in below]


def find_run(reference: Path) -> Path:
    """A run folder by its path, or by the id of a run that was listed before or is below ./runs.

    Errors: UsageError.
    """
    if reference.is_file():
        archive = "an export has no weights and no data to go on from: give the run's folder or id"
        raise UsageError(
            "a file, and not the folder of a run",
            where=str(reference),
            hint=archive if reference.suffix == ".zip" else None,
        )
    if reference.exists() or len(reference.parts) != 1:
        return reference
    runs = Path("runs")

    def look(index: sqlite3.Connection) -> list[Path]:
        if runs.is_dir():
            _refresh(index, runs)
        rows = index.execute(
            "SELECT path FROM runs WHERE run_id = ? ORDER BY path", [str(reference)]
        )
        return [Path(path) for (path,) in rows]

    found = _with_index(look)
    # It may have been moved away since.
    found = [path for path in found if _has_id(path, str(reference))]
    if not found:
        raise UsageError(
            "no such folder, and no run of that id is known here",
            where=str(reference),
            hint="`post-training runs list FOLDER` makes the runs below a folder known",
        )
    return found[0]


def runs_below(folder: Path, known: Collection[str] = ()) -> Iterator[Path]:
    """Run folders in or below `folder`, sorted; not those in run folders. known: paths of run
    folders that are not looked into. Errors: UsageError."""
    if not folder.is_dir():
        raise UsageError("no such folder", where=str(folder))
    if str(folder) in known:
        yield folder
        return
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries), key=lambda entry: entry.name)
    names = {entry.name for entry in found}
    if RECORD_NAME in names or (
        LAUNCH_FOLDER in names and (folder / LAUNCH_FOLDER / SUBMISSION_NAME).exists()
    ):
        yield folder
        return
    for entry in found:
        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
            yield from runs_below(folder / entry.name, known)


def _warn_of_unknown(index: sqlite3.Connection, root: str, settings: Collection[str]) -> None:
    """Warn of each setting that no run below has: a slip of the pen, or of another stage."""
    known = [
        key
        for (key,) in index.execute(
            f"SELECT DISTINCT key FROM runs, json_each(recipe) WHERE {_BELOW}",
            [f"{root}/", f"{root}/"],
        )
    ]
    for key in settings if known else ():
        if key not in known:
            problem = f"no run has the setting {key!r} in its recipe{nearest(key, known)}"
            tell(f"warning: {problem}")


def _has_id(run_dir: Path, run_id: str) -> bool:
    return (run_dir / RECORD_NAME).exists() and read_record(run_dir).get("run_id") == run_id


def _with_index(look: Callable[[sqlite3.Connection], _T]) -> _T:
    """What `look` finds in the index: the user's, made again where it is damaged, or else one in
    memory, where no fault of a disk is in its way."""
    path = user_cache() / "runs.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _without_index(path, error, look)
    try:
        return _look_into(path, look)
    except (sqlite3.Error, ValueError) as error:
        if not _is_damage(error):
            return _without_index(path, error, look)
        tell(f"warning: damaged, and made again: {path}: {error}")
    with contextlib.suppress(OSError, sqlite3.Error):
        for left in ("", "-journal", "-wal", "-shm"):
            path.with_name(f"{path.name}{left}").unlink(missing_ok=True)
        return _look_into(path, look)
    return _look_into(":memory:", look)


def _without_index(path: Path, problem: Exception, look: Callable[[sqlite3.Connection], _T]) -> _T:
    tell(f"warning: no index is kept in {path}: {problem}")
    return _look_into(":memory:", look)


def _is_damage(error: sqlite3.Error | ValueError) -> bool:
    """Of the file; not a lock or a full disk."""
    if isinstance(error, sqlite3.Error):
        # Without a code: raised by Python, about a value that is none of ours.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        return code in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
    return True


def _look_into(path: Path | str, look: Callable[[sqlite3.Connection], _T]) -> _T:
    with contextlib.closing(_connect(path)) as index:
        return look(index)


def _connect(path: Path | str) -> sqlite3.Connection:
    index = sqlite3.connect(path, timeout=30)
    (version,) = index.execute("PRAGMA user_version").fetchone()
    with index:
        if version != _VERSION:
            index.execute("DROP TABLE IF EXISTS runs")
            index.execute(f"PRAGMA user_version = {_VERSION}")
        index.execute(f"CREATE TABLE IF NOT EXISTS runs ({_COLUMNS}, PRIMARY KEY (path))")
        index.execute("CREATE INDEX IF NOT EXISTS runs_by_id ON runs (run_id)")
    return index


def _refresh(index: sqlite3.Connection, folder: Path) -> None:
    """Make the rows below `folder` what its runs are now."""
    root = folder.absolute()
    rows = {
        path: row
        for path, *row in index.execute("SELECT path, signature, state, job_ids FROM runs")
        if path == str(root) or path.startswith(f"{root}/")
    }
    signatures = {path: _signature(Path(path)) for path in rows}
    known = {path for path, signature in signatures.items() if signature}
    run_dirs = list(runs_below(root, known))
    unsettled = [
        run_dir
        for run_dir in run_dirs
        if (row := rows.get(str(run_dir))) is None
        or row[0] != signatures[str(run_dir)]
        or row[1] not in _SETTLED
    ]
    # What has ended may have been started again.
    ended = {
        path: job_ids
        for path, (_, state, jobs) in rows.items()
        if state != "finished" and path in known and (job_ids := json.loads(jobs))
    }
    queue = queue_if_it_answers([*unsettled, *map(Path, ended)])
    again = [Path(path) for path, job_ids in ended.items() if not queue.keys().isdisjoint(job_ids)]
    stale = set(rows) - set(map(str, run_dirs))
    with index:
        index.executemany("DELETE FROM runs WHERE path = ?", [(path,) for path in stale])
        # Before the state: what changes while it is read is read once more.
        read_from: list[str | None] = []
        states: list[RunState] = []
        for run_dir in sorted({*unsettled, *again}):
            signature = _signature(run_dir)
            try:
                states.append(run_state(run_dir, queue))
            # One record that is damaged, or may not be read, must not hide all the others.
            except (UsageError, OSError) as error:
                tell(f"warning: left out: {str(error).splitlines()[0]}")
                index.execute("DELETE FROM runs WHERE path = ?", [str(run_dir)])
            else:
                read_from.append(signature)
        for row in map(_row, add_slurm_states(states), read_from):
            index.execute(f"REPLACE INTO runs VALUES ({', '.join('?' * len(row))})", row)


def _signature(run_dir: Path) -> str | None:
    """Changes when a file does that a state is read from; None where no run is any more."""
    found = []
    for name in _READ_FROM:
        try:
            status = os.stat(f"{run_dir}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return json.dumps(found) if any(found[:2]) else None


def _row(state: RunState, signature: str | None) -> list[Any]:
    """In the order of `_COLUMNS`."""
    run_dir = state.run_dir
    record = read_record(run_dir) if (run_dir / RECORD_NAME).exists() else {}
    image = record.get("image")
    digests = [image.get(key) for key in _DIGESTS] if isinstance(image, dict) else []
    told = state.as_json()
    del told["run_dir"]
    return [
        str(run_dir),
        signature,
        state.state,
        record.get("run_id"),
        state.stage,
        next((attempt["started"] for attempt in record.get("attempts", [])), None),
        "".join(f":{str(digest).removeprefix('sha256:')}" for digest in digests if digest),
        json.dumps(record.get("recipe", {})),
        json.dumps(state.job_ids),
        json.dumps(told),
    ]
