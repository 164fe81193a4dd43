"""What has to run again, in its order, and what stands in its way.

Nothing is run or written here: files are read and hashed, and images looked up.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import ARTIFACT_RECORD, fingerprint
from post_training.core.secrets import is_redacted
from post_training.images.checkout import has_commit
from post_training.images.identity import check_image_digest
from post_training.images.reference import Reference, known_references
from post_training.images.release import read_releases
from post_training.images.store import ImageStore, open_store
from post_training.records.artifact import FETCHED, read_artifact
from post_training.records.check import check_run
from post_training.records.machine import describe_machine
from post_training.records.promote import promoted_copy
from post_training.records.run_record import RECORD_NAME, read_record, read_whole_record
from post_training.slurm.environment import image_of
from post_training.slurm.run_index import find_run
from post_training.slurm.site import Site

# Of a machine's description, what may change bits.
_MACHINE = ("architecture", "processor", "instructions", "accelerators", "driver")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to reproduce.

    new_dir: None: beside the run.
    store: of images; None: the user's own.
    upstream: which of the runs that made its inputs are run again too: all of them, back to the
    data; or those whose artifact is gone or was changed (stale).
    tolerance: of the figures, relative, on another machine.
    site: the scheduler's name and settings, to run as jobs of it; None: here.
    nodes: of a job of several ranks; None: as many as they fill.
    repository: the checkout that an image is built from, when it is in no store.
    """

    new_dir: Path | None = None
    store: Path | None = None
    upstream: Literal["none", "stale", "all"] = "none"
    dry_run: bool = False
    tolerance: float = 0.01
    site: tuple[str, Site] | None = None
    nodes: int | None = None
    repository: Path = Path()


@dataclass(frozen=True)
class StoredImage:
    """An image that a store has. record: the store's."""

    record: dict[str, Any]
    store: ImageStore

    @property
    def squashfs(self) -> Path:
        return self.store.image_path(self.record["sqsh_sha256"])


@dataclass(frozen=True)
class Plan:
    """A run that is to be run again.

    image: None: it has to be fetched first: pulled, from where it was pushed to, or built again.
    site: its name and settings, with nodes for the run's ranks; None: here.
    inputs: {key of an input: where it is now}.
    upstream: {key of an input: (run folder that made it, where in it)}, of those that are to be run
    again as well.
    notes: what will not be as it was, as far as it is known before.
    missing: what stands in the way.
    """

    run_dir: Path
    record: dict[str, Any]
    image: StoredImage | None
    site: tuple[str, Site] | None
    inputs: dict[str, Path]
    upstream: dict[str, tuple[Path, Path]]
    notes: list[str]
    missing: list[str]


def make_plans(run: Path, options: Options) -> list[Plan]:
    """A plan for each run that is to be run again, in their order; the run itself is the last.

    run: its folder, or what it made.
    Errors: UsageError for a run that cannot be run again anywhere.
    """
    stores = _stores(options)
    plans: dict[Path, Plan] = {}
    named = _find_run_folder(run)

    def visit(run_dir: Path) -> None:
        if run_dir in plans:
            return
        stale = options.upstream == "stale" and run_dir != named
        plan = _plan(run_dir, stores, options, stale=stale)
        for folder, _ in plan.upstream.values():
            visit(folder)
        plans[run_dir] = plan

    visit(named)
    return list(plans.values())


def _stores(options: Options) -> list[ImageStore]:
    """The user's own, and the one on the site's permanent storage."""
    stores = [open_store(options.store)]
    if options.site and (permanent := options.site[1].storage.permanent):
        folder = Path(os.path.expandvars(permanent), "images")
        if folder.is_dir():
            stores.append(ImageStore(folder))
    return stores


def _find_run_folder(path: Path) -> Path:
    """Of a run, or of what it made."""
    if (path / RECORD_NAME).exists() or not (path / ARTIFACT_RECORD).exists():
        return path
    return _find_maker(path, read_artifact(path)["made_by"]["run_id"])


def _find_maker(path: Path, run_id: str) -> Path:
    """The run that made an artifact: above it, or where it is known to be. Errors: UsageError."""
    for folder in path.parents:
        if (folder / RECORD_NAME).exists() and read_record(folder).get("run_id") == run_id:
            return folder
    try:
        return find_run(Path(run_id))
    except UsageError as error:
        raise UsageError(
            f"the folder of run {run_id}, which made it, is gone", where=str(path), hint=error.hint
        ) from None


def _plan(run_dir: Path, stores: list[ImageStore], options: Options, *, stale: bool) -> Plan:
    """stale: it is run again since what it made was gone or changed."""
    record = read_whole_record(run_dir)
    _check_reproducible(record, run_dir)
    found = check_run(run_dir)
    # A verdict on what was changed since would be one on somebody's edit. But that an artifact was
    # changed may be why its maker is run again: its record says what it was.
    of_artifacts = (
        [f"{made['path']}/" for made in record["outputs"]["artifacts"].values()] if stale else []
    )
    notes, missing = found.remarks, []
    for fault in found.faults:
        told = notes if fault.startswith(tuple(of_artifacts)) else missing
        told.append(f"{run_dir}: not what the run left: {fault}")
    notes += [
        f"{name} held a secret and is not set again"
        for name, value in record["environment"].items()
        if is_redacted(value)
    ]
    inputs, makers = _plan_inputs(record, options, notes, missing)
    image = _plan_image(record, stores, options, notes, missing)
    site = None
    if options.site is None:
        notes += machine_differences(record["machine"], describe_machine())
    else:
        try:
            site = _for_ranks(options.site, record, options.nodes)
        except UsageError as error:
            missing.append(f"{record['run_id']}: {error.problem} ({error.hint})")
        missing += _form_faults(image, options.site[1])
        notes.append(
            f"the machine is known when the job starts; the run's was {_name_machine(record)}"
        )
    return Plan(run_dir, record, image, site, inputs, makers, notes, missing)


def _plan_inputs(
    record: dict[str, Any], options: Options, notes: list[str], missing: list[str]
) -> tuple[dict[str, Path], dict[str, tuple[Path, Path]]]:
    """`inputs` and `upstream` of the plan; adds to its notes and to what is missing."""
    inputs: dict[str, Path] = {}
    makers: dict[str, tuple[Path, Path]] = {}
    for key, value in record["inputs"].items():
        path = Path(value["path"])
        of_a_run = "made_by" in value and value["made_by"]["stage"] != FETCHED
        is_made_again = options.upstream == "all" and of_a_run
        inputs[key], fault = path, None
        if not is_made_again:
            inputs[key], fault = _find_input(path, value["fingerprint"])
        if inputs[key] != path:
            notes.append(f"{key}: from its promoted copy {inputs[key]}, instead of {path}")
        if is_made_again or (fault and options.upstream == "stale" and of_a_run):
            folder = _find_maker(path, value["made_by"]["run_id"])
            makers[key] = (folder, _place_in(folder, path))
        elif fault:
            missing.append(f"{key}: {fault}")
    return inputs, makers


def _plan_image(
    record: dict[str, Any],
    stores: list[ImageStore],
    options: Options,
    notes: list[str],
    missing: list[str],
) -> StoredImage | None:
    """None where it has to be built again; adds to the plan's notes and to what is missing."""
    try:
        image = _find_image(record, stores)
    except UsageError as error:
        if references := image_references(record["image"], options.repository):
            notes.append(
                f"image {record['image']['oci_digest'][:19]} is in no store; it is pulled from "
                f"{references[0]}"
            )
        elif fault := restore_fault(record["image"], options.repository):
            missing.append(f"{error.where}: {error.problem}, {fault}")
        else:
            commit = record["image"]["checkout"]["commit"]
            notes.append(
                f"image {record['image']['oci_digest'][:19]} is in no store; "
                f"it is built again from commit {commit[:12]}"
            )
        return None
    except PostTrainingError as error:
        missing.append(str(error))
        return None
    notes += _commit_note(record["image"], image.record)
    return image


def image_references(image: Mapping[str, Any], repository: Path) -> list[Reference]:
    """Where a run's image can be pulled from, by the run's record and by images.lock."""
    releases = [
        entry
        for entry in read_releases(repository.resolve())
        if entry["oci_digest"] == image["oci_digest"]
    ]
    return known_references(image, *releases)


def _for_ranks(
    named: tuple[str, Site], record: Mapping[str, Any], nodes: int | None
) -> tuple[str, Site]:
    name, site = named
    ranks = num_ranks(record)
    if record["stage"] == "exec" and record["placement"]["ranks"] == "node":
        scheduler = site.scheduler.once_a_node().model_copy(update={"nodes": ranks})
    else:
        scheduler = site.scheduler.for_ranks(ranks, nodes)
    return name, site.model_copy(update={"scheduler": scheduler})


def _place_in(folder: Path, path: Path) -> Path:
    """Where in the run's folder its artifact lies, wherever that folder was when it was used."""
    if path.is_relative_to(folder):
        return path.relative_to(folder)
    made = [each["path"] for each in read_record(folder)["outputs"]["artifacts"].values()]
    for start in reversed(range(len(path.parts))):
        place = Path(*path.parts[start:])
        if any(place.is_relative_to(name) for name in made):
            return place
    raise UsageError(f"no output of the run in {folder} has this name", where=str(path))


def _check_reproducible(record: dict[str, Any], run_dir: Path) -> None:
    if record["status"] != "finished":
        raise UsageError(f"the run is not finished (it is {record['status']})", where=str(run_dir))
    if record["image"] is None:
        raise UsageError("the run was unpinned: no image digest is recorded", where=str(run_dir))
    if (over := record.get("mounted_over")) and over[0] == "/":
        raise UsageError(
            "its image was writable, and what ran before the stage may have changed it, so its "
            "digest is not all of its code",
            where=str(run_dir),
            hint="writable = false in the EDF, or an image that has the change",
        )
    if over:
        raise UsageError(
            f"{over[0]} of its image was mounted over, so its digest is not all of its code",
            where=str(run_dir),
            hint="build an image that has the change",
        )
    if foreign := record.get("foreign_variables"):
        raise UsageError(
            f"other code than its image's may have run: {', '.join(foreign)} was set",
            where=str(run_dir),
            hint="build an image that has the code",
        )
    if not record["reproducible_by_digest"]:
        raise UsageError(
            "the run used a development mount, so its image digest is not all of its code",
            where=str(run_dir),
            hint=f"check out {record['code'].get('commit')}, apply the recorded diff, and run it",
        )


def _find_image(record: dict[str, Any], stores: list[ImageStore]) -> StoredImage:
    """The stored image of the recorded OCI digest, verified; the very file if it is there.

    Errors: UsageError, of the first store, when none has it; PostTrainingError when it is damaged.
    """
    wanted = record["image"]
    first_error: UsageError | None = None
    for store in stores:
        exact = store.image_path(wanted["sqsh_sha256"])
        try:
            image = store.find(wanted["sqsh_sha256"] if exact.exists() else wanted["oci_digest"])
        except UsageError as error:
            first_error = first_error or error
        else:
            _check_claims(wanted, image)
            check_image_digest(store.image_path(image["sqsh_sha256"]), image["sqsh_sha256"])
            return StoredImage(image, store)
    assert first_error is not None
    raise first_error


def _check_claims(recorded: Mapping[str, Any], image: Mapping[str, Any]) -> None:
    """Errors: PostTrainingError when the run's record says other things of its image than the
    store's record of the image does."""
    claims = [
        f"{key} is {recorded[key]}, and that of the image is {image[key]}"
        for key in ("oci_digest", "input_hash")
        if recorded[key] != image[key]
    ]
    if claims:
        raise PostTrainingError(f"the run's record is not of its image: {'; '.join(claims)}")


def _commit_note(recorded: Mapping[str, Any], image: Mapping[str, Any]) -> list[str]:
    """Where the same bytes were built from another commit. Neither record can prove its own."""
    then, now = ((each.get("checkout") or {}).get("commit") for each in (recorded, image))
    if then == now:
        return []
    return [f"the image's commit was {then}, its record in the store says {now}; its bytes are "
            "the same"]  # fmt: skip


def restore_fault(image: Mapping[str, Any], repository: Path) -> str | None:
    """Why the image cannot be built from its recipe here."""
    checkout = image.get("checkout")
    if checkout is None or checkout["dirty"]:
        return "and no commit holds the sources that it was built from"
    if not has_commit(repository, checkout["commit"]):
        return (
            f"and there is no commit {checkout['commit'][:12]} in {repository.absolute()} to build "
            "it from (--repository names the checkout)"
        )
    return None


def _find_input(path: Path, recorded: str) -> tuple[Path, str | None]:
    """Where it is now: as it was, or a promoted copy of it; and what is wrong with it there."""
    fault = _input_fault(path, recorded)
    if fault is None or (copy := promoted_copy(path)) is None:
        return path, fault
    if copy_fault := _input_fault(copy, recorded):
        return path, f"{fault}; its promoted copy: {copy_fault}"
    return copy, None


def _input_fault(path: Path, recorded: str) -> str | None:
    try:
        found = fingerprint(path)
    except FileNotFoundError:
        return f"gone: {path}"
    if found == recorded:
        return None
    return f"changed: {path} (fingerprint is {found[:12]}, the run had {recorded[:12]})"


def num_ranks(record: Mapping[str, Any]) -> int:
    """Of a stage whose ranks count, or whose model is spread over them; any other is run by one."""
    topology = record["topology"]
    return topology.get("world_size", topology.get("tensor_parallel_size", 1))


def _form_faults(image: StoredImage | None, site: Site) -> list[str]:
    """Why the site's launcher cannot start the image."""
    if image is not None:
        try:
            image_of(image.record, image.store, site.launcher)
        except UsageError as error:
            return [f"{error.where}: {error.problem} ({error.hint})"]
    return []


def _name_machine(record: Mapping[str, Any]) -> str:
    then = record["machine"]
    told = [then[key] for key in _MACHINE if key != "instructions" and then.get(key)]
    return ", ".join(map(str, told))


def machine_differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the machine may change bits, where it is another one now."""
    return [
        f"{key} was {then[key]!r}, here it is {now[key]!r}"
        for key in _MACHINE
        if key in then and then[key] != now[key]
    ]
