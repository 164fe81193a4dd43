"""Run folders as training leaves them, with little in them."""

import json
from pathlib import Path
from typing import Any

from post_training.core.hashing import fingerprint, sha256_file
from post_training.records.artifact import origin_of, seal_artifact
from post_training.records.run import RunDescription, RunFolder

IMAGE = {
    "name": "cpu",
    "version": "0.1.0",
    "input_hash": 64 * "3",
    "oci_digest": "sha256:" + 64 * "4",
    "sqsh_sha256": 64 * "5",
    "checkout": {"commit": 40 * "6", "dirty": False},
    "verified_by": "runner",
    "check": "cached",
}


def training_line(step: int, loss: float) -> dict[str, Any]:
    timing = {"time": f"2026-11-21T10:00:{step:02d}Z", "tokens_per_s": 50.5}
    return {"step": step, "loss": loss, "num_tokens": 100 * step, "timing": timing}


def evaluation_line(step: int, loss: float) -> dict[str, Any]:
    timing = {"time": f"2026-11-21T10:00:{step:02d}Z"}
    return {"step": step, "eval": {"loss": loss}, "timing": timing}


LINES = [training_line(2, 2.0), evaluation_line(2, 2.5), training_line(4, 1.5)]


def ended_run(
    run_dir: Path,
    base: Path,
    *,
    lines: list[dict[str, Any]] = LINES,
    status: str = "finished",
    num_attempts: int = 1,
    recipe: dict[str, Any] | None = None,
    placement: dict[str, Any] | None = None,
) -> Path:
    """A run of `sft` of the model in `base`, which may be another run's; RUN/model is an artifact.

    num_attempts: all but the last were stopped by a signal.
    """
    found = fingerprint(base)
    made_by = origin_of(base, found)
    inputs = {"model.path": {"path": str(base), "fingerprint": found}}
    if made_by is not None:
        inputs["model.path"]["made_by"] = made_by
    facts = {
        "command": ["entrypoint", "sft", "sft.yaml"],
        "working_dir": str(run_dir.parent),
        "recipe_hash": 64 * "7",
        "placement": {"run_dir": str(run_dir), **(placement or {})},
        "debug": False,
        "code": {"from": "image", "commit": 40 * "6", "dirty": False},
        "reproducible_by_digest": True,
        "mounts": [],
        "mounted_over": [],
        "environment": {},
        "machine": {"host": "nid001234", "processor": "a processor", "cpus": 2},
        "scheduler_job": "7.0",
        "packages": {"post-training": "0.1.0"},
    }
    settings = {"seed": 1, "training.learning_rate": 1e-3, **(recipe or {})}
    description = RunDescription("sft", settings, {"num_threads": 2}, inputs, IMAGE, facts)
    for number in range(1, num_attempts + 1):
        folder = RunFolder(run_dir)
        folder.claim()
        folder.start(description)
        if number < num_attempts:
            folder.close("interrupted", reason="stopped by SIGTERM")
            folder._lock.close()
    (run_dir / "config.yaml").write_text(f"run_dir: {run_dir}\nseed: 1\n")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outputs = None
    if status == "finished":
        (run_dir / "model").mkdir()
        (run_dir / "model/config.json").write_text('{"model_type": "llama"}')
        (run_dir / "model/weights").write_text(run_dir.name)
        artifact = seal_artifact(run_dir / "model", "model", folder.record)
        outputs = {
            "artifacts": {"model": {"path": "model", "fingerprint": artifact["fingerprint"]}},
            "files": {f"model/{file}": digest for file, digest in artifact["files"].items()},
            "run_files": {"config.yaml": sha256_file(run_dir / "config.yaml")},
            "unstable_files": ["metrics.jsonl"],
        }
    figures = {"loss": 1.5, "num_trained_tokens": 400, "timing": {"wall_s": 3.0}}
    folder.close(status, outputs=outputs, metrics=figures)
    folder._lock.close()
    return run_dir
