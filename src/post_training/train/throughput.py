"""How fast a run trains: tokens per second, utilisation of the devices, peak memory.

A step lasts from the end of the one before to its own end, without what is `paused` (evaluation,
saving). The first steps of an attempt, in which kernels are compiled and memory is allocated, are
in no summary.

    model FLOPs utilisation (MFU) = FLOPs the model needs per second / peak FLOPs of all devices

Counted is what the model needs, not what was done: nothing for padding, for activations computed
again under gradient checkpointing, for masked attention, or for evaluation.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import PreTrainedModel

from post_training.models.attention import has_window

# Dense peaks of bfloat16 and float16 products, FLOP/s, by the name torch gives the device; a GCD is
# a device. The sheets of NVIDIA give H100, H200 and GH200 with sparsity, which doubles them.
#   https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet     H100
#   https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446      H200
#   https://resources.nvidia.com/en-us-grace-cpu/grace-hopper-superchip                 GH200
#   https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
#   https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html    383e12 for two GCDs
_HALF_PRECISION_PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "AMD Instinct MI250X": 191.5e12,
}
WARMUP_STEPS = 3
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of the forward and backward pass.

    body: per token.
    head: of the output layer, per token that a loss is taken of.
    attention: per squared length of a sequence.

    A matrix of P parameters takes 2P per token forward, 2P for the gradient of its input, and 2P
    for its own gradient unless it is frozen: 6P in full fine-tuning, 4P for a weight that LoRA
    leaves as it is. Attention takes 12·L·H·Q·T per token (L layers, H heads of size Q, T tokens
    that it sees) in PaLM's count, appendix B of https://arxiv.org/abs/2204.02311. A causal mask
    leaves half of it, 6·L·H·Q·T: PaLM counts the other half too, so its MFU is higher.
    """

    body: float
    head: float
    attention: float

    def of_step(
        self, num_tokens: int, num_trained_tokens: int, sum_of_squared_lengths: int
    ) -> float:
        return (
            self.body * num_tokens
            + self.head * num_trained_tokens
            + self.attention * sum_of_squared_lengths
        )


def model_flops(model: PreTrainedModel) -> ModelFlops | None:
    """Of a dense decoder with full attention; None for one with experts or a sliding window.

    The rows of the input embedding are looked up, not multiplied with: they don't count.
    """
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS) or has_window(config):
        return None
    embedding = model.get_input_embeddings().weight
    # A reward model has none: its one output is nothing beside the rest.
    head = getattr(model.get_output_embeddings(), "weight", None)
    matrices = [
        parameter
        for parameter in model.parameters()
        if len(_shape(parameter)) >= 2 and parameter is not embedding and parameter is not head
    ]
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return ModelFlops(
        body=sum(map(_flops_per_token, matrices)),
        head=0 if head is None else _flops_per_token(head),
        attention=6 * config.num_hidden_layers * num_heads * head_size,
    )


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Of one device, multiplying in `dtype`. None where it isn't known: on CPUs, a slice of a GPU,
    in float32 (which may or may not be TF32)."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return half_precision_peak(torch.cuda.get_device_name(device))


def half_precision_peak(device_name: str) -> float | None:
    return _HALF_PRECISION_PEAKS.get(device_name)


def _flops_per_token(parameter: torch.nn.Parameter) -> int:
    return (6 if parameter.requires_grad else 4) * prod(_shape(parameter))


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """ZeRO-3 leaves an empty tensor, and the shape in another attribute."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@dataclass
class _Interval:
    num_steps: int = 0
    seconds: float = 0.0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    flops: float = 0.0


class Throughput:
    """Of all ranks together, but for memory: that is this rank's. No MFU without both FLOPs.

    flops: None where the model's aren't known.
    peak_flops_per_s: of all devices together; None where it isn't known.
    clock: seconds that never go back.
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
