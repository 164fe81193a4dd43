"""Step e: which settings of ours make a GPU give the same bytes, and what else has to work on one.

Each variant is trained twice, in processes of their own, a few of them at a time: with all that we
set for determinism, and with each of it left out. Equal weights with a setting left out say that it
made no difference to this model on this device, no more. Then torch.compile, and a process group
of one rank.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from step import PREFIX, Step, start

# What be_deterministic sets (models/device.py), each left out in turn.
LEFT_OUT = ("nothing", "algorithms", "cublas", "flash", "everything")
OTHERS = ("compile", "fsdp2")


def main() -> None:
    step = start(__doc__)
    step.attempt("process group of one rank", lambda: _one_rank(step))
    variants = [*LEFT_OUT, *(OTHERS if step.has_gpu else ("compile",))]
    # Processes beside each other: they wait for their own start most of the time.
    at_once = 5 if step.has_gpu else 1
    with ThreadPoolExecutor(at_once) as pool:
        runs = {
            (name, number): pool.submit(_in_process, step, name, number)
            for name in variants
            for number in (1, 2)
        }
        for name in variants:
            _tell(step, name, [runs[name, number].result() for number in (1, 2)])
    if not step.has_gpu:
        step.skip("fsdp2 on one rank", "it needs a GPU; on CPUs it would become ddp")


def _tell(step: Step, name: str, found: list[dict[str, Any]]) -> None:
    what = f"left out: {name}" if name in LEFT_OUT else f"{name}, twice"
    if problem := next((each["error"] for each in found if "error" in each), None):
        step.tell(what, error=problem)
        return
    equal = found[0]["sha256"] == found[1]["sha256"]
    figures = {"step_s": found[0]["step_s"], "sha256": found[0]["sha256"]}
    if name in ("nothing", *OTHERS):
        step.check(f"{what}: equal weights", equal, **figures)
    else:
        step.tell(what, equal_weights=equal, **figures)


def _in_process(step: Step, name: str, number: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--device", step.device, "--variant", name]
    command += ["--folder", step.folder / f"{name}-{number}", *(["--tiny"] if step.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"error": last[:300]}
    return json.loads(lines[-1].removeprefix(PREFIX))


def _one_variant() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    parser.add_argument("--variant")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    from post_training.models.quiet import quiet_libraries

    quiet_libraries(options.folder / "cache")
    _set_what_is_left(options.variant)
    import torch
    from check_training import weights_sha256
    from made_up import SHAPES, MadeUpRows, random_model
    from training import Clock, train_sft

    shape = SHAPES["tiny" if options.tiny else "0.1B"]
    lengths = (30, 60, 38) if options.tiny else (700, 1300, 48)
    model = random_model(shape, options.device, torch.bfloat16)
    clock = Clock(3)
    digests: list[str] = []

    def at_end(step: int) -> None:
        if step == len(clock.ends) == clock.num_steps + 2:
            digests.append(weights_sha256(model))

    clock.at_end = at_end
    training: dict[str, Any] = {"torch_compile": options.variant == "compile"}
    train_sft(
        model,
        MadeUpRows(16, lengths, shape["vocab_size"]),
        options.folder / "run",
        clock,
        training=training,
        distributed={"strategy": "fsdp2"} if options.variant == "fsdp2" else None,
    )
    found = {"sha256": digests[0], "step_s": round(clock.step_s, 4)}
    print(PREFIX + json.dumps(found), flush=True)


def _set_what_is_left(left_out: str) -> None:
    """be_deterministic without a part of it, before a GPU is first used."""
    import os

    if left_out == "everything":
        return
    from post_training.models.device import be_deterministic

    be_deterministic()
    import torch

    if left_out == "algorithms":
        torch.use_deterministic_algorithms(False)
    if left_out == "cublas":
        # torch refuses to multiply without it, unless it is only to warn.
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        torch.use_deterministic_algorithms(True, warn_only=True)
    if left_out == "flash":
        os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "0"


def _one_rank(step: Step) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    backend = "nccl" if step.has_gpu else "gloo"
    store = dist.HashStore()
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    values = torch.arange(8.0, device=step.device)
    expected = values.clone()
    dist.all_reduce(values)
    dist.destroy_process_group()
    assert torch.equal(values, expected)
    version = ".".join(map(str, torch.cuda.nccl.version())) if step.has_gpu else None
    return {"good": True, "backend": backend, "nccl": version}


if __name__ == "__main__":
    _one_variant() if "--variant" in sys.argv else main()
