"""Run any command with the record of a run: another trainer, a merge, an evaluation.

    RUN/work/NAME      each input: a link, of a small file a copy; the command starts in RUN/work
    RUN/work/…         what the command writes
    RUN/NAME           each output, moved there once the command has ended with exit code 0
    RUN/logs/…         what it printed, a file for each attempt and rank

The command sees its inputs by name and writes below its working folder, so it runs the same in any
run folder: that is what lets `reproduce` run it again. Whether the bytes repeat is up to it.

Each rank starts the command once. It gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT; where there is one rank a node, also the variables by which torchrun
knows its node (PET_NNODES, PET_NODE_RANK, PET_RDZV_BACKEND, PET_RDZV_ENDPOINT).
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from post_training.core.errors import Interrupted, PostTrainingError, UsageError, tell
from post_training.core.files import (
    atomic_directory,
    atomic_file,
    copy_folder,
    sync_folder,
    write_atomic,
)
from post_training.core.process import dies_with
from post_training.images.inside import is_code_of_image, read_mounts
from post_training.stages.config import CommandOutput, ExecConfig
from post_training.stages.context import Ranks, Result, StageContext

_WORK, _LOGS = "work", "logs"
# Written when the command has succeeded; a run that is stopped afterwards only keeps its outputs.
_DONE = ".command-finished"
_CHUNK_BYTES = 1 << 16
_LAST_OUTPUT_S = 10
_LEAST_LINKED_BYTES = 16 << 20


@dataclass(frozen=True)
class _Start:
    """What rank 0 prepared for all. port: for the command's own ranks to meet."""

    is_done: bool
    attempt: int
    port: int


def run(config: ExecConfig, context: StageContext) -> Result:
    """Start the command, wait for it and keep what it made.

    Errors: UsageError for a program or a path that the command could not have; PostTrainingError
    where it fails, or leaves an output out.
    """
    start = context.on_writer(lambda: _prepare(config, context))
    began = time.monotonic()
    if not start.is_done:
        log = context.run_dir / _LOGS / _log_name(context.ranks, start.attempt)
        log.touch()  # attempts are counted by it, also those that print nothing
        context.log(f"running {shlex.join(config.command)}\nits output is kept in {log}")
        _run_command(config, context, start, log)
    unstable = context.on_writer(lambda: _keep_outputs(config, context))
    logs = sorted(path.name for path in (context.run_dir / _LOGS).iterdir())
    return Result(
        artifacts={output.name: output.name for output in config.outputs},
        metrics={"timing": {"command_s": round(time.monotonic() - began, 3)}},
        unstable_files=[*(f"{_LOGS}/{name}" for name in logs), *unstable],
    )


def _prepare(config: ExecConfig, context: StageContext) -> _Start:
    work, logs = context.run_dir / _WORK, context.run_dir / _LOGS
    logs.mkdir(exist_ok=True)
    attempt = len(list(logs.glob("rank-0.*.log"))) + 1
    if (work / _DONE).exists():
        return _Start(True, attempt, 0)
    _refuse_undeclared(config)
    _refuse_links_into_image(config)
    if config.on_restart == "begin" and work.exists():
        shutil.rmtree(work)
    for output in config.outputs:
        shutil.rmtree(context.run_dir / output.name, ignore_errors=True)
    work.mkdir(exist_ok=True)
    for item in config.inputs:
        _give(item.path.absolute(), work / item.name)
    with socket.socket() as probe:
        probe.bind(("", 0))
        return _Start(False, attempt, probe.getsockname()[1])


def _give(path: Path, place: Path) -> None:
    """Let the command find an input at `place`.

    Of a link to a script Python takes the folder where the script really lies, and would import
    from there what is no input. So a file is copied, unless it is too large to be a script.
    """
    place.unlink(missing_ok=True)
    if path.is_file() and path.stat().st_size < _LEAST_LINKED_BYTES:
        shutil.copyfile(path, place)
        place.chmod(place.stat().st_mode | (path.stat().st_mode & 0o111))
    else:
        place.symlink_to(path)


def _refuse_undeclared(config: ExecConfig) -> None:
    """Errors: UsageError for a path of a mount in the command that is no input: it would be read,
    and the record would not know what it was."""
    targets = [Path(mount.split(":")[1]) for mount in read_mounts()]
    for word in config.command:
        path = Path(word.partition("=")[2] or word) if word.startswith("-") else Path(word)
        if not path.is_absolute() or not path.exists():
            continue
        if any(path.is_relative_to(target) for target in targets):
            raise UsageError(
                f"command: {path} is no input of the run, so nothing would say what it held",
                hint=f"name it in inputs, as {{name: {path.name}, path: {path}}} (or "
                f"--input {path.name}={path}), and write {path.name} in the command",
            )


def _refuse_links_into_image(config: ExecConfig) -> None:
    """Errors: UsageError for an input that has a link into the image. Elsewhere the link leads to
    another file, so `reproduce` would find that the input changed."""
    for item in config.inputs:
        if is_code_of_image(item.path):
            continue
        for path in item.path.rglob("*"):
            if path.is_symlink() and is_code_of_image(path):
                raise UsageError(
                    f"inputs: {path} is a link to {path.resolve()} of the image, and leads to "
                    "another file, or none, elsewhere",
                    hint="put a copy in its place; a Python environment has copies, and no links, "
                    "with `python -m venv --copies`",
                )


def _log_name(ranks: Ranks, attempt: int) -> str:
    return f"rank-{ranks.rank}.attempt-{attempt}.log"


def _run_command(config: ExecConfig, context: StageContext, start: _Start, log: Path) -> None:
    """Errors: UsageError for a program that is not there; PostTrainingError where it fails."""
    work = context.run_dir / _WORK
    environment = _environment(config, context.ranks, start.port)
    program = config.command[0]
    if shutil.which(program, path=environment["PATH"]) is None and "/" not in program:
        raise UsageError(f"command: no program {program!r} in this image", hint=_HINT_OF_PROGRAM)
    # A signal that came between the start and the wait would leave the command running.
    with _held_signals() as held:
        try:
            process = subprocess.Popen(
                config.command,
                cwd=work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A group of its own: a signal reaches it once, through us, and what it leaves
                # running can be ended with it.
                start_new_session=True,
                preexec_fn=_start_of_child(os.getpid(), held),
            )
        except OSError as error:
            raise UsageError(
                f"command: {program} cannot be started: {(error.strerror or str(error)).lower()}",
                hint=_hint_of_path(config) or _HINT_OF_PROGRAM,
            ) from None
        with _copied_output(process, log):
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
                # Not process.wait(): an exception there can leave its lock taken, for ever.
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            except Interrupted as stopped:
                _pass_on(process, stopped, config.grace_s)
                raise
            finally:
                # What it left behind holds the pipe open, and would go on writing.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
    if code != 0:
        ended = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise PostTrainingError(
            f"the command {ended}",
            where=str(log),
            hint=_hint_of_path(config),
        )
    _wait_for_all(context, log.parent)
    if context.ranks.is_writer:
        _sync_outputs(config, work)
        write_atomic(work / _DONE, "")


def _wait_for_all(context: StageContext, logs: Path) -> None:
    """Until the command has succeeded on every rank: it is done then, and not before.

    A rank on which it failed ends at once, which closes its connection to the others.
    Errors: PostTrainingError where that happens.
    """
    try:
        context.gather(None)
    except RuntimeError:
        raise PostTrainingError("the command failed on another rank", where=str(logs)) from None


@contextmanager
def _held_signals() -> Iterator[set[signal.Signals]]:
    """Signals wait until the mask that is yielded, the one of before, is set again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_of_child(parent: int, mask: set[signal.Signals]) -> Callable[[], None]:
    """What the child does before it becomes the command: it takes signals, and ends with us."""
    arrange = dies_with(parent)

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        arrange()

    return start


_HINT_OF_PROGRAM = "the first word of the command is a program of the image, or an input's name"


def _hint_of_path(config: ExecConfig) -> str | None:
    """A word of the command that is a path where the user stands, and not where it runs."""
    known = {item.name for item in config.inputs}
    for word in config.command:
        path = Path(word.partition("=")[2] or word) if word.startswith("-") else Path(word)
        if not path.is_absolute() and path.exists() and path.parts and path.parts[0] not in known:
            return (
                f"{path} is no input, and the command runs in a folder of its own, where only the "
                f"inputs are: --input {path.parts[0]}={path.parts[0]}"
            )
    return None


def _environment(config: ExecConfig, ranks: Ranks, port: int) -> dict[str, str]:
    environment = dict(os.environ)
    # For our own modules alone (entrypoints/entrypoint): a script may import what lies beside it.
    environment.pop("PYTHONSAFEPATH", None)
    environment["PYTHONUNBUFFERED"] = "1"
    # Bytecode beside the modules of an input, such as a Python environment, would change the input.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    # `python`, `torchrun` and the like are those of the pinned environment.
    own = str(Path(sys.executable).parent)
    if own not in environment.get("PATH", "").split(os.pathsep):
        environment["PATH"] = f"{own}{os.pathsep}{environment.get('PATH', os.defpath)}"
    address = environment.get("MASTER_ADDR", "127.0.0.1")
    environment |= {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "MASTER_ADDR": address,
        # Ours is taken by our own ranks.
        "MASTER_PORT": str(port),
    }
    if ranks.world_size > 1 and ranks.local_world_size == 1:
        environment |= {
            "PET_NNODES": str(ranks.world_size),
            "PET_NODE_RANK": str(ranks.rank),
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": f"{address}:{port}",
        }
    return environment | config.environment


@contextmanager
def _copied_output(process: subprocess.Popen[bytes], log: Path) -> Iterator[None]:
    """Copy what the command prints to the log and to our stderr, until it ends."""
    assert process.stdout is not None
    source = process.stdout.fileno()

    def copy() -> None:
        is_kept = True
        while chunk := os.read(source, _CHUNK_BYTES):
            # Read on in any case: a command whose output nobody reads waits for ever.
            try:
                if is_kept:
                    _append(log, chunk)
            except OSError as error:
                is_kept = False
                reason = (error.strerror or str(error)).lower()
                tell(f"warning: {log}: {reason}; the rest of the output is not kept")
            # A terminal that is gone is no reason to lose the log.
            with suppress(OSError):
                os.write(2, chunk)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        # Not for ever: what left our process group may still hold the pipe.
        thread.join(timeout=_LAST_OUTPUT_S)


def _append(log: Path, data: bytes) -> None:
    with open(log, "ab", buffering=0) as kept:
        while data:
            data = data[kept.write(data) :]


def _pass_on(process: subprocess.Popen[bytes], stopped: Interrupted, grace_s: int) -> None:
    """Send the command the signal that stops the run, and give it time to end."""
    process.send_signal(signal.Signals[stopped.signal_name])
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)


def _sync_outputs(config: ExecConfig, work: Path) -> None:
    """To the disk, before it is said that they are complete. Errors: PostTrainingError."""
    for output in config.outputs:
        made = work / output.path
        if not made.exists():
            raise PostTrainingError(
                f"the command ended with exit code 0 and left no {output.path}",
                where=str(work),
                hint=f"outputs says where it makes {output.name}: {_there(work, config)}",
            )
        for link in _links_out(made, config.unstable):
            _put_copy(link)
        if made.is_dir():
            sync_folder(made)


def _links_out(made: Path, unstable: Sequence[str]) -> list[Path]:
    """Links of an output that would lead elsewhere, or nowhere, once it is moved: what they lead to
    is no part of the artifact. A link from one place of the output to another is one."""
    if made.is_symlink():
        return [made]
    own = made.resolve()
    return [
        path
        for path in made.rglob("*")
        if path.is_symlink()
        and not _matches(path.relative_to(made).as_posix(), unstable)
        and (path.readlink().is_absolute() or not path.resolve().is_relative_to(own))
    ]


def _put_copy(link: Path) -> None:
    """In place of a link, a copy of what it leads to. Errors: PostTrainingError."""
    target = link.resolve()
    if not target.exists() or link.parent.resolve().is_relative_to(target):
        what = "which is not there" if not target.exists() else "a folder that it is in"
        raise PostTrainingError(f"a link of the output leads to {target}, {what}", where=str(link))
    tell(f"{link} is a link to {target}: a copy is kept")
    if not target.is_dir():
        with atomic_file(link) as temporary:
            shutil.copyfile(target, temporary)
        return
    copy = link.with_name(f"{link.name}.copy")
    with atomic_directory(copy) as temporary:
        copy_folder(target, temporary)
    link.unlink()
    copy.rename(link)


def _there(work: Path, config: ExecConfig) -> str:
    inputs = {item.name for item in config.inputs}
    names = sorted(path.name for path in work.iterdir() if path.name not in inputs)
    return f"it left {', '.join(names[:8])}" if names else "it left nothing"


def _keep_outputs(config: ExecConfig, context: StageContext) -> list[str]:
    """Move the outputs to RUN/NAME, without what is unstable; that, below the run folder."""
    work = context.run_dir / _WORK
    for output in config.outputs:
        made, kept = work / output.path, context.run_dir / output.name
        if not made.exists():
            continue  # Kept already, by an attempt that was stopped after it.
        if made.is_dir():
            _move_folder(made, kept, config.unstable)
        else:
            with atomic_directory(kept) as folder:
                shutil.copyfile(made, folder / made.name)
            made.unlink()
    return [
        f"{_WORK}/{path.relative_to(work).as_posix()}"
        for output in config.outputs
        for path in sorted(_unstable_folder(work, output).rglob("*"))
        if path.is_file()
    ]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _unstable_folder(work: Path, output: CommandOutput) -> Path:
    return work / ".unstable" / output.name


def _move_folder(made: Path, kept: Path, unstable: Sequence[str]) -> None:
    aside = kept.parent / _WORK / ".unstable" / kept.name
    for path in sorted(made.rglob("*")):
        name = path.relative_to(made).as_posix()
        if (path.is_file() or path.is_symlink()) and _matches(name, unstable):
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(aside / name)
    made.rename(kept)
