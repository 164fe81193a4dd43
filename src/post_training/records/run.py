"""A run folder and the life of the run in it: run.json is opened before the run starts, and closed
at its end, whatever the end.

Rank 0 is the one writer. It holds a lock on the run folder for as long as it lives, so a folder
is live exactly while somebody works in it, even when that somebody was killed without a word.

    RunFolder(path)          .claim()   live -> refused
    .remove_trial()          empties the folder of a debug run; any other is refused
    .start(description)      new, or another attempt of the same run; else refused, naming the key,
                             unless the run before it failed before it made anything
    .close(status, reason)   finished | failed | interrupted; of one that was killed, the next
                             attempt writes that
"""

import errno
import os
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from post_training.config.model import changed_settings
from post_training.core.errors import PostTrainingError, UsageError, tell
from post_training.core.files import check_keys, remove_leftovers, write_json
from post_training.core.hashing import sha256_file
from post_training.core.locks import hold, is_held
from post_training.core.secrets import find_secret, is_redacted, redact, redact_all
from post_training.records.run_record import (
    CONFIG_NAME,
    METRICS_NAME,
    RECORD_NAME,
    SCHEMA,
    fingerprints,
    identity_of,
    image_identity,
    read_record,
    record_faults,
    seal,
)

# Written by `post-training submit` before the run, and by its job.
LAUNCH_FOLDER = "slurm"
# Of stages that work in chunks: the chunks, and the records of those who made them. They may be
# there before the run itself, which puts the chunks together.
SHARED_FOLDERS = ("chunks", "workers")
_KEYS_TO_GO_ON = ("run_id", "status", "stage", "recipe", "topology", "inputs", "image", "attempts")
_LOCK_NAME = ".lock"


@dataclass(frozen=True)
class RunDescription:
    """What a run is, before it starts.

    recipe, topology: {dotted key: JSON value}.
    inputs: {dotted key: {"path", "fingerprint", and "made_by" where an artifact says it}}.
    image: its identity; None in an unpinned run.
    facts: what else the record says.
    """

    stage: str
    recipe: dict[str, Any]
    topology: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    image: dict[str, Any] | None
    facts: dict[str, Any]

    @property
    def input_fingerprints(self) -> dict[str, str]:
        return fingerprints(self.inputs)

    @property
    def identity(self) -> str:
        """Equal for two runs that must have equal results: sha256 over what determines them."""
        return identity_of(
            {
                "stage": self.stage,
                "recipe": self.recipe,
                "topology": self.topology,
                "inputs": self.inputs,
                "image": self.image,
            }
        )


class AlreadyFinished(UsageError):
    """The very same run is in the folder, and finished."""


class RunFolder:
    def __init__(self, path: Path):
        self.path = path
        self.record: dict[str, Any] = {}
        self.replaced: str | None = None  # by `start`: the run that was here, and what differs
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Create the folder and lock it. Errors: UsageError while another run works in it, and for
        a path that holds a secret."""
        if kind := find_secret(str(self.path.absolute())):
            raise UsageError(f"the path of the run folder holds a secret ({kind})")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.path / _LOCK_NAME)  # Until the process ends.
        if self._lock is None:
            raise UsageError(
                f"a run is live in this folder ({_last_attempt(self.path)})",
                where=str(self.path),
                hint="wait for it, or choose another run_dir",
            )

    def remove_trial(self) -> None:
        """Empty the claimed folder if a debug run is in it.

        Errors: UsageError when it holds a run that is none, or something else.
        """
        earlier = earlier_record(self.path)
        if earlier is None:
            return
        if not earlier.get("debug"):
            raise UsageError(
                f"not a debug run, so debug.override_existing leaves it (run {earlier['run_id']})",
                where=str(self.path),
                hint="choose another run_dir",
            )
        # The record last: a removal cut short must still be known as a trial.
        keep = (_LOCK_NAME, RECORD_NAME, LAUNCH_FOLDER)
        for path in [path for path in self.path.iterdir() if path.name not in keep]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (self.path / RECORD_NAME).unlink()

    def start(
        self, description: RunDescription, *, allow_topology: bool = False, reopen: bool = False
    ) -> bool:
        """Write the record with status running; True when an earlier attempt is continued.

        Another run that failed before it made anything is replaced, and `replaced` says so.
        A secret in what the record says is redacted, with a word in `redacted` and on the screen.
        allow_topology: continue although the topology changed; the attempt says so.
        reopen: continue a finished run too: a worker's, which ended when nothing was left to claim.
        Errors: AlreadyFinished; UsageError when the folder holds another run, or something else, or
        an input's path a secret.
        """
        for key, value in description.inputs.items():
            if kind := find_secret(value["path"]):
                raise UsageError(f"the path of the input holds a secret ({kind})", where=key)
        facts = _without_secrets(description.facts)
        earlier = earlier_record(self.path)
        if earlier is not None:
            check_keys(earlier, _KEYS_TO_GO_ON, self.path / RECORD_NAME)
        # A worker's folder never holds what it made: that is the run's.
        if earlier is not None and not reopen and _made_nothing(self.path, earlier):
            earlier = self._replace_if_another(earlier, description, allow_topology=allow_topology)
        changed: list[str] = []
        if earlier is None:
            self.record = _new_record(description, facts)
        else:
            changed = check_same_run(self.path, earlier, description, allow_topology=allow_topology)
            self.record = self._continued(earlier, facts, reopen=reopen)
        self.record["attempts"].append(
            {
                "process": os.getpid(),
                **{key: description.facts[key] for key in ("machine", "scheduler_job")},
                "started": _now(),
                "ended": None,
                "status": "running",
                "reason": None,
                **({"changed_topology": changed} if changed else {}),
            }
        )
        remove_leftovers(self.path, RECORD_NAME, CONFIG_NAME)
        self._write()
        return earlier is not None

    def _replace_if_another(
        self, earlier: dict[str, Any], now: RunDescription, *, allow_topology: bool
    ) -> dict[str, Any] | None:
        """The earlier record, of a run that made nothing; None where it is of another run, whose
        files are removed."""
        try:
            check_same_run(self.path, earlier, now, allow_topology=allow_topology)
        except UsageError as error:
            differs = error.problem.removeprefix("the folder holds another run: ")
            ended = f"{earlier['status']} before it made anything"
            self.replaced = f"run {earlier['run_id']} ({ended}): {differs}"
            _remove_first_try(self.path)
            return None
        return earlier

    def _continued(
        self, earlier: dict[str, Any], facts: dict[str, Any], *, reopen: bool
    ) -> dict[str, Any]:
        """The record of the same run, for one attempt more."""
        if earlier["status"] == "finished" and not reopen:
            raise AlreadyFinished(
                f"this run is finished (run {earlier['run_id']})",
                where=str(self.path),
                hint="choose another run_dir to run it again; "
                "`post-training reproduce` compares the two",
            )
        if faults := record_faults(earlier):
            # Going on would put a seal on it.
            raise UsageError(
                faults[0],
                where=str(self.path / RECORD_NAME),
                hint="put the original back, or choose another run_dir",
            )
        earlier.pop("redacted", None)  # Of an earlier attempt's environment.
        record = {**earlier, "status": "running", "reason": None, **facts}
        for attempt in record["attempts"]:
            if attempt["status"] == "running":  # It holds the lock no more.
                attempt["status"] = "killed"
        return record

    def close(
        self,
        status: str,
        reason: str | None = None,
        *,
        outputs: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Write the end: status "finished", "failed" or "interrupted", and why."""
        end = {"status": status, "reason": reason and redact(reason)[0]}
        if outputs is not None:
            outputs = {**outputs, "run_files": self._run_files(outputs)}
        self.record |= {**end, "outputs": outputs, "metrics": metrics or {}}
        self.record["attempts"][-1] |= {**end, "ended": _now()}
        self._write()

    def _run_files(self, outputs: dict[str, Any]) -> dict[str, str]:
        """{name: sha256} of the files that hold times or paths. No two runs have the same, so they
        are not compared; but an edit of them is noticed."""
        names = {CONFIG_NAME, METRICS_NAME, *outputs.get("unstable_files", [])}
        # Reporters may write until the process ends.
        names = {name for name in names if not name.startswith(("tensorboard/", "wandb/"))}
        return {
            name: sha256_file(self.path / name)
            for name in sorted(names)
            if (self.path / name).is_file()
        }

    def _write(self) -> None:
        if not (self.path / _LOCK_NAME).exists():
            # Whoever removed the folder must not find one with nothing but this in it.
            raise FileNotFoundError(errno.ENOENT, "the run's folder was removed", str(self.path))
        self.record["seal"] = seal(self.record)
        write_json(self.path / RECORD_NAME, self.record)


def _new_record(description: RunDescription, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "run_id": _new_run_id(description.stage),
        "status": "running",
        "reason": None,
        "stage": description.stage,
        "identity": description.identity,
        "recipe": description.recipe,
        "topology": description.topology,
        "inputs": description.inputs,
        "image": description.image,
        **facts,
        "attempts": [],
        "outputs": None,
        "metrics": {},
    }


def _made_nothing(run_dir: Path, record: dict[str, Any]) -> bool:
    """Whether the run ended by itself without a row, a step, a checkpoint, or any other content:
    for example, because the model's path was wrong."""
    if record["status"] not in ("failed", "interrupted"):
        return False
    kept = {_LOCK_NAME, RECORD_NAME, CONFIG_NAME, LAUNCH_FOLDER}
    for path in run_dir.rglob("*"):
        parts = path.relative_to(run_dir).parts
        # What was being written when it failed (core/files.py) never counted.
        if parts[0] in kept or any(part.endswith(".tmp") for part in parts):
            continue
        if path.is_symlink() or (path.is_file() and path.stat().st_size > 0):
            return False
    return True


def _remove_first_try(run_dir: Path) -> None:
    """Remove all but the lock, what `submit` wrote, and the record: it is replaced in one step."""
    for path in run_dir.iterdir():
        if path.name in (_LOCK_NAME, RECORD_NAME, LAUNCH_FOLDER):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_same_run(
    path: Path, earlier: dict[str, Any], now: RunDescription, *, allow_topology: bool = False
) -> list[str]:
    """The changed topology settings, when that is allowed.

    path: of what says `earlier`: stage, recipe, inputs, image and topology.
    Errors: UsageError that names what differs.
    """
    changed = {
        "stage": [] if earlier["stage"] == now.stage else [f"{earlier['stage']} -> {now.stage}"],
        "recipe": changed_settings(earlier["recipe"], now.recipe),
        "input": changed_settings(fingerprints(earlier["inputs"]), now.input_fingerprints),
        "image": changed_settings(image_identity(earlier["image"]), image_identity(now.image)),
        "topology": changed_settings(earlier["topology"], now.topology),
    }
    for kind, lines in changed.items():
        if lines and not (kind == "topology" and allow_topology):
            folder = path if path.is_dir() else path.parent
            hint = f"choose another run_dir, undo the change, or begin again: rm -r {folder}"
            if earlier.get("debug"):
                hint += "; debug.override_existing=true does so for a debug run"
            if kind == "topology":
                hint += "; --allow-topology-change continues all the same"
            raise UsageError(
                f"the folder holds another run: {kind}: {'; '.join(lines)}",
                where=str(path),
                hint=hint,
            )
    return changed["topology"]


def earlier_record(run_dir: Path) -> dict[str, Any] | None:
    """The record in an existing run folder, or None where a new run may begin.

    Errors: UsageError when the folder holds something else.
    """
    if (run_dir / RECORD_NAME).exists():
        return read_record(run_dir)
    names = sorted(path.name for path in run_dir.iterdir() if not path.name.startswith("."))
    if foreign := [name for name in names if name not in (LAUNCH_FOLDER, *SHARED_FOLDERS)]:
        raise UsageError(
            f"the folder is not empty and holds no run (found {foreign[0]!r})",
            where=str(run_dir),
            hint="choose another run_dir",
        )
    return None


def is_live(run_dir: Path) -> bool:
    """Whether a process holds the folder. A record that says running and is not live was killed."""
    return is_held(run_dir / _LOCK_NAME)


def _without_secrets(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with `redacted`, a line for each secret that was taken out, here or before."""
    kept, told = redact_all(facts)
    told += [
        f"environment.{name}: {value}"
        for name, value in facts.get("environment", {}).items()
        if is_redacted(value)
    ]
    told += [f"code.diff: {kind}" for kind in facts.get("code", {}).get("redacted", [])]
    for line in told:
        tell(f"warning: a secret is not recorded: {line}")
    return {**kept, "redacted": told} if told else kept


def _last_attempt(run_dir: Path) -> str:
    try:
        attempt = read_record(run_dir)["attempts"][-1]
    except (PostTrainingError, LookupError):
        return "just started"
    job = attempt["scheduler_job"]
    place = f"job {job}" if job else f"process {attempt['process']}"
    return f"{place} on {attempt['machine']['host']}, since {attempt['started']}"


def _new_run_id(stage: str) -> str:
    return f"{stage}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
