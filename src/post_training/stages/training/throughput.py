"""How fast a run trains: tokens per second, utilisation of the devices, peak memory.

A step lasts from the end of the one before to its own end, without what is `paused` (evaluation,
saving). The first steps of an attempt, in which kernels are compiled and memory is allocated, are
in no summary.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from post_training.stages.training.flops import ModelFlops

WARMUP_STEPS = 3


@dataclass
class _Interval:
    num_steps: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    flops: float = 0.0


class Throughput:
    """Of all ranks together, but for memory: that is this rank's.

    flops: None where the model's aren't known. peak_flops_per_s: of all devices together, None
    where it isn't known; there is no MFU without both. clock: seconds that never go back.
    """

    def __init__(
        self,
        flops: ModelFlops | None = None,
        peak_flops_per_s: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._flops = flops
        self._peak = peak_flops_per_s
        self._clock = clock
        self._step_began: float | None = None
        self._num_steps = 0
        self._line = _Interval()
        self._summary = _Interval()

    def begin(self) -> None:
        """The attempt's first step begins now; later calls change nothing."""
        if self._step_began is None:
            self._step_began = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no part of a step."""
        began = self._clock()
        yield
        if self._step_began is not None:
            self._step_began += self._clock() - began

    def end_step(
        self, num_tokens: int, num_trained_tokens: int, sum_of_squared_lengths: int
    ) -> None:
        """A step ends now, and the next one begins."""
        assert self._step_began is not None, "begin() was not called"
        now = self._clock()
        flops = 0.0
        if self._flops is not None:
            flops = self._flops.of_step(num_tokens, num_trained_tokens, sum_of_squared_lengths)
        self._num_steps += 1
        intervals = [self._line]
        if self._num_steps > WARMUP_STEPS:
            intervals.append(self._summary)
        for interval in intervals:
            interval.num_steps += 1
            interval.seconds += now - self._step_began
            interval.num_tokens += num_tokens
            interval.num_trained_tokens += num_trained_tokens
            interval.flops += flops
        self._step_began = now

    def end_line(self) -> dict[str, Any]:
        """Speeds since the line before, and the peak of memory so far."""
        speeds = self._speeds(self._line)
        self._line = _Interval()
        return {**speeds, "peak_memory_bytes": peak_memory_bytes()}

    def summary(self) -> dict[str, Any]:
        """Of this attempt without its first WARMUP_STEPS steps; no speeds if there are no more."""
        speeds = self._speeds(self._summary) if self._summary.num_steps else {}
        return {
            "num_steps": self._summary.num_steps,
            **speeds,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _speeds(self, interval: _Interval) -> dict[str, float]:
        seconds = interval.seconds
        speeds = {
            "step_s": round(seconds / interval.num_steps, 4),
            "tokens_per_s": round(interval.num_tokens / seconds, 1),
            "trained_tokens_per_s": round(interval.num_trained_tokens / seconds, 1),
        }
        if self._flops is not None and self._peak is not None:
            speeds["mfu"] = round(interval.flops / seconds / self._peak, 4)
        return speeds


def peak_memory_bytes() -> int:
    """The most this process had at once: of its GPU in tensors, else of main memory (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
