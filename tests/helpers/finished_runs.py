"""Finished runs as training leaves them, made without training anything."""

import json
import struct
from math import prod
from pathlib import Path

from helpers import ended_runs
from post_training.core.hashing import fingerprint, sha256_file
from post_training.records.artifact import seal_artifact
from post_training.records.run import RunDescription, RunFolder

FORMATS = {"F32": "f", "I64": "q", "BF16": "H", "BOOL": "?"}


def write_tensors(path, **tensors):
    """A safetensors file; each tensor is (dtype, shape, values)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, values) in tensors.items():
        packed = struct.pack(f"<{prod(shape)}{FORMATS[dtype]}", *values)
        offsets = [len(data), len(data) + len(packed)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += packed
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def finish_run(
    folder: Path, name: str, *, loss: float = 2.0, weight: float = 1.0, **recipe
) -> Path:
    """A run of an input beside it."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a row"}\n')
    (folder / "input").mkdir(exist_ok=True)
    (folder / "input/config.json").write_text("{}")
    run_dir = folder / name
    inputs = {
        key: {"path": str(path), "fingerprint": fingerprint(path)}
        for key, path in {"data.path": rows, "model.path": folder / "input"}.items()
    }
    opened = RunFolder(run_dir)
    opened.claim()
    opened.start(
        RunDescription("sft", {"seed": 1, **recipe}, {"num_threads": 2}, inputs, IMAGE, FACTS)
    )
    (run_dir / "config.yaml").write_text(f"run_dir: {run_dir}\nseed: 1\n")
    lines = [{"step": step, "loss": loss / step, "timing": {"s": 1}} for step in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"step": step, "rows": "0a", "loss": loss / step, "grad_norm": 0.5} for step in (1, 2)]
    (run_dir / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (run_dir / "model").mkdir()
    (run_dir / "model/config.json").write_text("{}")
    write_tensors(run_dir / "model/model.safetensors", head=("F32", [2], [weight, 2.0]))
    artifact = seal_artifact(run_dir / "model", "model", opened.record)
    digests = {f"model/{file}": digest for file, digest in artifact["files"].items()}
    digests["steps.jsonl"] = sha256_file(run_dir / "steps.jsonl")
    outputs = {
        "artifacts": {"model": {"path": "model", "fingerprint": artifact["fingerprint"]}},
        "files": digests,
        "unstable_files": ["metrics.jsonl"],
    }
    opened.close("finished", outputs=outputs, metrics={"loss": loss / 2})
    opened._lock.close()
    return run_dir


MACHINE = {
    "host": "nid001234",
    "kernel": "6.1.0",
    "architecture": "x86_64",
    "processor": "a processor",
    "cpus": 2,
}
IMAGE = {**ended_runs.IMAGE, "path": "/home/someone/images/sha256-5.sqsh"}
FACTS = {
    "command": ["entrypoint", "sft", "/users/someone/work/sft.yaml"],
    "working_dir": "/users/someone/work",
    "recipe_hash": 64 * "7",
    "placement": {"run_dir": "/users/someone/work/runs/one"},
    "debug": False,
    "code": {"from": "image", "commit": 40 * "6", "dirty": False},
    "reproducible_by_digest": True,
    "mounts": ["/users/someone/work:/users/someone/work", "/capstor/scratch/cscs/someone:/scratch"],
    "mounted_over": [],
    "environment": {"OMP_NUM_THREADS": "2", "SLURM_JOB_NODELIST": "nid001234"},
    "machine": MACHINE,
    "scheduler_job": "7.0",
    "packages": {"post-training": "0.1.0"},
}
