"""`post-training experiment check FOLDER`: an experiment's pipeline again, beside what it gave.

FOLDER/pipeline.yaml    what is run, in a new folder
       expected.json    of every run its artifacts' fingerprints and its last figures; the image
                        and the kind of machine that they come from

identical    every artifact is the same, in whatever image
equivalent   other bits, on another machine or in another image, and every figure within tolerance
differs      the first run that is neither
"""

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from post_training.core.errors import ConfigError, UsageError, tell
from post_training.core.files import read_json, write_json
from post_training.records.check import check_run
from post_training.records.run_record import read_record
from post_training.reproduce.verdict import DIFFERS, EQUIVALENT, IDENTICAL
from post_training.slurm.pipeline_commands import Where, run_pipeline

SCHEMA = "post-training/expected/1"
_PIPELINE, _EXPECTED = "pipeline.yaml", "expected.json"
_TOLERANCE = 0.02


def check_experiment(
    folder: Path, run_dir: Path | None, where: Where, *, write: bool
) -> tuple[int, str]:
    """The exit code (0 identical, 3 equivalent, 4 differs) and the verdict; with `write` the file
    that was written.

    run_dir: None: a new one below build; one that was begun is gone on with.
    write: make what comes out the expected.

    Errors: UsageError for a folder that is no experiment; as `run_pipeline`.
    """
    pipeline, expected_path = folder / _PIPELINE, folder / _EXPECTED
    if not pipeline.exists():
        raise UsageError(f"no experiment: there is no {_PIPELINE}", where=str(folder))
    if not write and not expected_path.exists():
        raise UsageError(
            f"nothing to compare with: there is no {_EXPECTED}",
            where=str(folder),
            hint="--write makes it from a run of the experiment",
        )
    if run_dir is None:
        run_dir = Path("build/experiments", f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}")
    plan = run_pipeline(pipeline, [f"run_dir={run_dir}"], where, unpinned=False)
    # Runs that were finished before are kept: what they made may have been changed since.
    if faults := [
        f"{run.run_dir}: not what the run left: {fault}"
        for run in plan.runs
        for fault in check_run(run.run_dir).faults
    ]:
        raise ConfigError(faults, hint="give another --run-dir")
    found = summary({run.name: read_record(run.run_dir) for run in plan.runs})
    if write:
        kept = read_json(expected_path, SCHEMA) if expected_path.exists() else {}
        tolerance = kept.get("tolerance", _TOLERANCE)
        write_json(expected_path, {"schema": SCHEMA, "tolerance": tolerance, **found})
        return IDENTICAL, str(expected_path)
    code, verdict, notes = grade(read_json(expected_path, SCHEMA), found)
    for note in notes:
        tell(f"note: {note}")
    return code, verdict


def summary(records: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What is compared, of the runs' records by their names in the pipeline."""
    one = next(iter(records.values()))
    return {
        "image_input_hash": one["image"] and one["image"]["input_hash"],
        "machine": {
            key: one["machine"].get(key)
            for key in ("architecture", "processor", "instructions", "accelerators")
        },
        "runs": {
            name: {
                "artifacts": {
                    kind: made["fingerprint"]
                    for kind, made in record["outputs"]["artifacts"].items()
                },
                "figures": {
                    key: value for key, value in record["metrics"].items() if key != "timing"
                },
            }
            for name, record in records.items()
        },
    }


def grade(expected: dict[str, Any], found: dict[str, Any]) -> tuple[int, str, list[str]]:
    """The exit code, the verdict, and what is other than it was."""
    # Of the machine, as much as is known of the one then.
    here = {**found, "machine": {key: found["machine"].get(key) for key in expected["machine"]}}
    notes = [
        f"{key} was {expected[key]}, here it is {here[key]}"
        for key in ("image_input_hash", "machine")
        if expected[key] != here[key]
    ]
    if expected["runs"].keys() != found["runs"].keys():
        names = sorted(expected["runs"].keys() ^ found["runs"].keys())
        return DIFFERS, f"differs: other runs than expected: {', '.join(names)}", notes
    num_artifacts = sum(len(run["artifacts"]) for run in expected["runs"].values())
    changed = [
        name
        for name, run in expected["runs"].items()
        if run["artifacts"] != found["runs"][name]["artifacts"]
    ]
    if not changed:
        num_runs = len(expected["runs"])
        return IDENTICAL, f"identical: {num_artifacts} artifacts of {num_runs} runs", notes
    if not notes:
        return DIFFERS, f"differs: {changed[0]}: other artifacts, in the same image", notes
    for name, run in expected["runs"].items():
        figures = found["runs"][name]["figures"]
        for fault in _faults(run["figures"], figures, expected["tolerance"]):
            return DIFFERS, f"differs: {name}: {fault}", notes
    told = f"equivalent: every figure is within {expected['tolerance']:g} of what was expected"
    return EQUIVALENT, f"{told}; other bits from {changed[0]} on", notes


def _faults(
    expected: Mapping[str, float], found: Mapping[str, float], tolerance: float
) -> Iterator[str]:
    """Figures that are off by more than `tolerance`, relative."""
    for key, value in expected.items():
        if key not in found:
            yield f"no figure {key}"
        # Not `>`: NaN is off.
        elif not abs(found[key] - value) <= tolerance * max(abs(value), abs(found[key])):
            yield f"{key} is {found[key]:.6g}, {value:.6g} was expected"
