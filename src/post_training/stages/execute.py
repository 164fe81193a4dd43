"""The life of a stage run, the same for every stage.

    configuration -> ranks -> image checked, inputs fingerprinted (describe.py) -> run.json opened
                  -> the stage -> inputs unchanged? -> outputs fingerprinted -> run.json closed

Rank 0 alone touches the record. Whatever ends the run (an error, a signal, a full disk) is written
there as its reason; only SIGKILL, and a second Ctrl-C, leave a record that says running, which the
next look notices.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from post_training.config.load import load_config, load_overrides, resolved_yaml
from post_training.config.model import changed_settings, settings_by_role
from post_training.core.errors import Interrupted, PostTrainingError, UsageError, tell
from post_training.core.files import write_atomic
from post_training.core.hashing import WatchedInputs, sha256_file
from post_training.core.secrets import check_named_files
from post_training.images.inside import missing_path_hint
from post_training.models.quiet import quiet_libraries
from post_training.records import machine
from post_training.records.artifact import seal_artifact
from post_training.records.promote import find_store, promote
from post_training.records.run import AlreadyFinished, RunDescription, RunFolder
from post_training.records.run_record import CONFIG_NAME, read_record
from post_training.report.page import leave_page
from post_training.stages.config import StageConfig
from post_training.stages.context import Ranks, Result, StageContext
from post_training.stages.describe import describe_run
from post_training.stages.processes import (
    Launch,
    detect_launch,
    exits_are_failures,
    ignore_signals,
    raise_on_signals,
    run_local_ranks,
)
from post_training.stages.registry import Stage, find_config_class, find_stage
from post_training.stages.run_dirs import default_run_dir

# Rank 0 may read terabytes of inputs while the others wait.
_WRITER_TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class Request:
    """What was asked on the command line.

    stage, config_path, overrides: which stage, with which settings; without a file, those of the
    overrides alone. command: the arguments as they
    were given. unpinned: run although no image digest is pinned. allow_topology_change: continue
    a run with another world size or micro-batch. skip_finished: succeed where the same run is
    finished already.
    """

    stage: str
    config_path: Path | None
    overrides: Sequence[str] = ()
    unpinned: bool = False
    allow_topology_change: bool = False
    skip_finished: bool = False
    command: Sequence[str] = ()


def execute(request: Request) -> int:
    """Run the stage in this process, or in one process per device; the exit code."""
    stage = find_stage(request.stage)
    config = _read_config(stage, request)
    check_named_files(os.environ)
    launch = detect_launch(os.environ)
    _remove_overruling_variables(launch)
    if launch is None:
        num_processes = config.num_processes or (
            1 if config.is_one_a_node else _num_local_devices()
        )
        if num_processes > 1:
            command = [sys.executable, "-m", "post_training.stages", *request.command]
            return run_local_ranks(command, num_processes)
        launch = Launch(0, 1, 0, 1, "127.0.0.1:0")
    elif config.num_processes not in (None, launch.local_world_size):
        raise UsageError(
            f"num_processes is {config.num_processes}, but the launcher started "
            f"{launch.local_world_size} here",
            where=request.config_path and str(request.config_path),
            hint="leave num_processes out under a launcher",
        )
    raise_on_signals()
    num_threads = config.num_threads or _share_of_cores(launch.local_world_size)
    # Read by torch when it is imported; the recorded number, not the machine's.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    config = config.model_copy(update={"num_threads": num_threads})
    config.check_ranks(launch.world_size)
    ranks = _join_ranks(launch)
    _check_ranks_agree(config, ranks)
    _run_recorded(request, stage, config, ranks)
    _leave_ranks(ranks)
    return 0


def _run_recorded(request: Request, stage: Stage, config: StageConfig, ranks: Ranks) -> None:
    """Open the record, run the stage, close the record. Every rank calls it."""
    record = _Record(request, stage, config, ranks)
    try:
        opened = ranks.on_writer(record.open)
        if opened is None:
            _promote(record)
            return
        context = StageContext(
            opened.run_dir.absolute(),
            ranks,
            resuming=opened.resuming,
            input_fingerprints=opened.description.input_fingerprints,
            description=opened.description,
            allow_topology_change=request.allow_topology_change,
            inputs=opened.inputs,
        )
        # Before the stage's module, which imports the libraries: they read their environment then.
        quiet_libraries(context.run_dir / "cache")
        with exits_are_failures():
            result = stage.load_run()(config, context)
        ignore_signals()  # It is done: from here on nothing but the record is missing.
        ranks.on_writer(lambda: record.close_finished(result))
    except BaseException as error:
        record.close_unfinished(error)
        raise
    context.log(f"finished: {opened.run_dir}")
    if ranks.is_writer and not config.is_worker:
        page = leave_page(opened.run_dir, find_config_class)
        can_be_repeated = opened.description.facts["reproducible_by_digest"]
        for line in _next_steps(stage, opened.run_dir, result, page, can_be_repeated):
            tell(line)
    _promote(record)


def _promote(record: "_Record") -> None:
    """After the record is closed: a copy that fails is an error, and the run is finished all the
    same. Every rank calls it."""
    if record.config.promote is not None and not record.config.is_worker:
        record.ranks.on_writer(record.promote)


def _next_steps(
    stage: Stage, run_dir: Path, result: Result, page: Path | None, can_be_repeated: bool
) -> Iterator[str]:
    """What to do with a finished run, in at most two lines."""
    steps = [
        *([f"look at {page}"] if page else []),
        *([f"check it with: post-training reproduce {run_dir}"] if can_be_repeated else []),
    ]
    if steps:
        yield f"next: {', and '.join(steps)}"
    if result.artifacts:
        # What the next stage takes comes first: of dpo the model, not the reference's scores.
        first, *others = (f"{run_dir}/{name}" for name in result.artifacts.values())
        # A checkpoint for Megatron-LM (`convert`) is for no stage of ours.
        is_ours = stage.used_as and "checkpoint" not in result.artifacts
        use = f", for {stage.used_as}" if is_ours else ""
        yield "; ".join([f"made: {first}{use}", *others])


def _read_config(stage: Stage, request: Request) -> StageConfig:
    """Errors: UsageError where there is no such file; ConfigError with every fault of it."""
    path = request.config_path
    if path is None:
        return load_overrides(stage.load_config_class(), request.overrides)
    if not path.exists():
        raise UsageError("no such file", where=str(path), hint=missing_path_hint(path))
    return load_config(stage.load_config_class(), path, request.overrides)


def _remove_overruling_variables(launch: Launch | None) -> None:
    """Unset the variables that would overrule settings; one rank of the job says which."""
    removed = machine.remove_overruling(os.environ)
    if removed and (launch is None or launch.rank == 0):
        tell(
            f"warning: not used: {', '.join(removed)}: the configuration alone says what is "
            "computed"
        )


def _num_local_devices() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _share_of_cores(num_processes: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def _join_ranks(launch: Launch) -> Ranks:
    """This process among those of the run; with several, torch.distributed is initialised."""
    group = None
    if launch.world_size > 1:
        os.environ |= launch.variables()
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        # Apart from the training's group, whose own timeout has to notice a hung rank.
        group = dist.new_group(backend="gloo", timeout=_WRITER_TIMEOUT)
    return Ranks(launch.rank, launch.local_rank, launch.world_size, launch.local_world_size, group)


def _check_ranks_agree(config: StageConfig, ranks: Ranks) -> None:
    """Every rank read the configuration itself: one that read another would train another model.

    Errors: UsageError, on every rank, that names the first one and the setting.
    """
    settings = settings_by_role(config)
    own = {key: value for part in settings.values() for key, value in part.items()}
    own["world_size"] = ranks.world_size
    read = ranks.gather(own)
    for rank, other in enumerate(read):
        if changed := changed_settings(read[0], other):
            raise UsageError(
                f"rank {rank} was started with other settings than rank 0: {changed[0]}",
                hint="give every process the same file and overrides",
            )


def _leave_ranks(ranks: Ranks) -> None:
    if ranks.world_size == 1:
        return
    import torch.distributed as dist

    dist.barrier()  # Nobody closes a connection that another still reads.
    dist.destroy_process_group()


class _Opened(NamedTuple):
    """What every rank has to know of the run that rank 0 opened."""

    run_dir: Path
    resuming: bool
    description: RunDescription
    inputs: WatchedInputs


class _Record:
    """The record of this run. Rank 0 alone opens it: on the others, `folder` stays None."""

    def __init__(self, request: Request, stage: Stage, config: StageConfig, ranks: Ranks):
        self.request = request
        self.stage = stage
        self.config = config
        self.ranks = ranks
        self.inputs = WatchedInputs()
        self.folder: RunFolder | None = None  # once the record in it says running
        self.finished: Path | None = None  # the run folder, once the record in it says so

    def open(self) -> _Opened | None:
        """Claim the run folder and write run.json; None when the run is finished already, and that
        is fine with who asked.

        Errors: those of the image, the inputs and the folder.
        """
        request, config = self.request, self.config
        if config.promote is not None:
            find_store()  # Now, and not when the work of days is done.
        description = describe_run(
            self.stage,
            config,
            self.ranks,
            self.inputs,
            command=request.command,
            unpinned=request.unpinned,
        )
        run_dir = config.run_dir or default_run_dir(config, description)
        _refuse_within_input(run_dir, description)
        folder = RunFolder(config.record_dir(run_dir))
        folder.claim()
        if config.debug.override_existing:
            folder.remove_trial()
        try:
            resuming = folder.start(
                description,
                allow_topology=request.allow_topology_change,
                reopen=config.is_worker,
            )
        except AlreadyFinished:
            if not request.skip_finished:
                raise
            tell(f"finished already: {folder.path}")
            self.finished = folder.path
            return None
        self.folder = folder
        if folder.replaced:
            tell(f"replaced {folder.replaced}")
        if not (folder.path / CONFIG_NAME).exists():
            write_atomic(folder.path / CONFIG_NAME, resolved_yaml(config))
        tell(_headline(folder.record, resuming, folder.path))
        return _Opened(folder.path, resuming, description, self.inputs)

    def close_finished(self, result: Result) -> None:
        """Fingerprint what was made and close the record as finished.

        Errors: PostTrainingError when an input changed meanwhile; what was made of it is removed.
        """
        folder = self.folder
        assert folder is not None
        try:
            self.inputs.check()
        except PostTrainingError:
            for name in result.artifacts.values():
                shutil.rmtree(folder.path / name, ignore_errors=True)
            raise
        unstable = sorted(set(result.unstable_files))
        artifacts: dict[str, Any] = {}
        files: dict[str, str] = {}
        for kind, name in result.artifacts.items():
            artifact = seal_artifact(folder.path / name, kind, folder.record)
            artifacts[kind] = {"path": name, "fingerprint": artifact["fingerprint"]}
            files |= {f"{name}/{file}": digest for file, digest in artifact["files"].items()}
        files |= {name: sha256_file(folder.path / name) for name in result.state_files}
        outputs = {"artifacts": artifacts, "files": files, "unstable_files": unstable}
        folder.close("finished", outputs=outputs, metrics=result.metrics)
        self.finished = folder.path

    def promote(self) -> None:
        """Copy the finished run's artifacts to artifacts/store. Errors: those of `promote`."""
        assert self.finished is not None
        for made in read_record(self.finished)["outputs"]["artifacts"].values():
            tell(f"promoted: {promote(self.finished / made['path'], None)}")

    def close_unfinished(self, error: BaseException) -> None:
        """Write why the run ended; nothing on a rank, or at a time, that has no record."""
        folder = self.folder
        if folder is None:
            return
        ignore_signals()
        if isinstance(error, KeyboardInterrupt):  # A library took the handler of Ctrl-C away.
            error = Interrupted("SIGINT", signal.SIGINT)
        if isinstance(error, Interrupted | PostTrainingError | OSError):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        try:
            folder.close(status, reason)
        except OSError as failed:
            # A full disk: the record still says running; the lock is released with this process.
            tell(f"warning: cannot close {folder.path}/run.json: {failed.strerror}")


def _refuse_within_input(run_dir: Path, description: RunDescription) -> None:
    """Errors: UsageError where what the run writes would change an input of it."""
    for key, found in description.inputs.items():
        folder = Path(found["path"])
        if folder.is_dir() and run_dir.resolve().is_relative_to(folder.resolve()):
            raise UsageError(
                f"the run folder {run_dir} is in this input, {folder}, which must not change",
                where=key,
                hint="set run_dir to a folder elsewhere",
            )


def _headline(record: dict[str, Any], resuming: bool, run_dir: Path) -> str:
    image = record["image"]
    where = (
        f"image {image['name']} {image['version']} {image['oci_digest'][:19]}, "
        f"verified by {image['verified_by']}"
        if image
        else "UNPINNED: not reproducible by digest"
    )
    verb = "continuing" if resuming else "starting"
    return f"{verb} {record['run_id']} in {run_dir} ({where})"
