"""What the device can do at most: a large product in bfloat16, and a copy in its memory.

Later figures are to be read beside these. On random numbers: zeros multiply faster.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from step import Step, start
from training import synchronize


def main() -> None:
    step = start(__doc__)
    size, numbers = step.pick((8192, 2**30), (256, 2**20))
    step.attempt("product in bfloat16", lambda: _product(step, size))
    step.attempt("copy in memory", lambda: _copy(step, numbers))


def _product(step: Step, size: int) -> dict[str, float]:
    a, b = (torch.randn(size, size, device=step.device).bfloat16() for _ in range(2))
    seconds = median_s(lambda: a @ b)
    return {"size": size, "tflop_per_s": round(2 * size**3 / seconds / 1e12, 4)}


def _copy(step: Step, numbers: int) -> dict[str, float]:
    """Bytes read and bytes written both count."""
    source = torch.randn(numbers, device=step.device)
    target = torch.empty_like(source)
    seconds = median_s(lambda: target.copy_(source))
    return {"gb_per_s": round(2 * source.nbytes / seconds / 1e9, 1)}


def median_s(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(10):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


if __name__ == "__main__":
    main()
