"""Step f: where the time of one step goes, by kernel, for whoever makes it faster next.

The step is that of `ours, LoRA 16, packed, sdpa` in step b. On a CPU it is torch's operators.
"""

from typing import Any

import torch
from made_up import SHAPES, MadeUpRows, random_model
from step import Step, start
from training import LORA, WARMUP_STEPS, Clock, train_sft

NUM_KERNELS = 25


def main() -> None:
    step = start(__doc__)
    step.attempt("kernels of a step", lambda: _profile(step))


def _profile(step: Step) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    from post_training.models.device import be_deterministic

    be_deterministic()
    shape = SHAPES[step.pick("8B", "tiny")]
    length = step.pick(4096, 256)
    rows = MadeUpRows(8, (length // 2, length // 4, length // 4), shape["vocab_size"])
    activity = ProfilerActivity.CUDA if step.has_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[activity])
    clock = Clock(1)

    def at_end(number: int) -> None:
        if number == WARMUP_STEPS:
            profiler.start()
        elif number == WARMUP_STEPS + 1:
            profiler.stop()

    clock.at_end = at_end
    model = random_model(shape, step.device, torch.bfloat16)
    train_sft(
        model,
        rows,
        step.folder / "run",
        clock,
        training={"gradient_checkpointing": True},
        lora=LORA,
    )
    key = "self_device_time_total" if step.has_gpu else "self_cpu_time_total"
    times = [(getattr(each, key), each.count, each.key) for each in profiler.key_averages()]
    total = sum(micros for micros, _, _ in times) or 1.0
    kernels = [
        {"ms": round(micros / 1e3, 3), "share": round(micros / total, 4), "calls": count,
         "name": name[:120]}
        for micros, count, name in sorted(times, reverse=True)[:NUM_KERNELS]
    ]  # fmt: skip
    return {"ms": round(total / 1e3, 2), "kernels": kernels}


if __name__ == "__main__":
    main()
