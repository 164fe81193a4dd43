"""Logits of some positions, a part at a time, and what is known of them without a gradient.

A chunk is some of the positions. Where no gradient is made along with it, the logits of a position
need not be together: a CPU multiplies many positions with a tile of the vocabulary, which stays in
its cache, in half the time of few positions with all of it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from post_training.models.logit_scaling import LogitScaling

# Ids of the vocabulary in a tile; elsewhere all of them. Logits are read several times, and should
# stay in a CPU's cache: tiles of 8192 took 1.2 times as long for 1280 positions. Smaller ones cost
# time where positions are few. Tests make it small, so that a tiny model has several tiles.
_TILE = {"cpu": 2048}
SMALLEST_CHUNK = 16  # positions
_ALL = slice(None)


@dataclass(frozen=True)
class OutputLayer:
    """The output layer: its weight in the dtype of the matrix products, its bias or None, and what
    the model does after it.

    in_float32: logits are not rounded to the dtype of the products. A product of bfloat16 matrices
    is added up in float32 in any case; rounding it costs a logit 2^-9 of its size.
    """

    weight: Float[Tensor, "V D"]
    bias: Float32[Tensor, " V"] | None
    scaling: LogitScaling
    in_float32: bool = False


@cache
def multiplies_into_float32(device: str) -> bool:
    """Whether torch multiplies bfloat16 matrices into a float32 one there. GPUs of NVIDIA do, from
    torch 2.8 on (https://github.com/pytorch/pytorch/pull/150812); CPUs don't, with torch 2.13."""
    matrix = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # no kernel; an older torch without this argument
        return False
    return True


def slower_float32_logits(device: str) -> str | None:
    """A line for the log where OutputLayer.in_float32 costs time; None where it doesn't."""
    if multiplies_into_float32(device):
        return None
    return (
        f"model.float32_logits: torch has no product of bfloat16 matrices into float32 on {device}:"
        " the output layer's weights are copied to float32 a part at a time, which is slower"
    )


class LogitsBuffer:
    """Room for [rows, columns] logits: a new one for each part costs a CPU a tenth of its time,
    and two of them are there at a time."""

    def __init__(self, layer: OutputLayer, rows: int, columns: int):
        dtype = torch.float32 if layer.in_float32 else layer.weight.dtype
        self._products = layer.weight.new_empty(rows * columns, dtype=dtype)
        self._logits = self._products
        if dtype != torch.float32:
            self._logits = torch.empty_like(self._products, dtype=torch.float32)

    def fill(
        self, hidden_ND: Float[Tensor, "N D"], layer: OutputLayer, ids: slice = _ALL
    ) -> Float32[Tensor, "N ids"]:
        """The final logits of some ids, until the next filling; the reader may overwrite them."""
        weight_VD = layer.weight[ids]
        shape = len(hidden_ND), len(weight_VD)
        products, logits = (
            flat[: shape[0] * shape[1]].view(shape) for flat in (self._products, self._logits)
        )
        if products.dtype == weight_VD.dtype:
            torch.mm(hidden_ND, weight_VD.T, out=products)
        elif multiplies_into_float32(weight_VD.device.type):
            torch.mm(hidden_ND, weight_VD.T, out_dtype=products.dtype, out=products)
        else:  # the same numbers, from copies of these weights
            torch.mm(hidden_ND.float(), weight_VD.float().T, out=products)
        if self._logits is not self._products:
            logits.copy_(products)
        if layer.bias is not None:
            logits.add_(layer.bias[ids])
        return layer.scaling.apply_(logits)


@dataclass
class Scores:
    """tops: 1 where the target is the likeliest id, else 0; zeros when nobody asked."""

    logprobs: Float32[Tensor, " N"]
    logsumexps: Float32[Tensor, " N"]
    tops: Float32[Tensor, " N"]


def score_positions(
    hidden_PD: Float[Tensor, "P D"],
    layer: OutputLayer,
    positions_N: Int64[Tensor, " N"],
    targets_N: Int64[Tensor, " N"],
    with_top: bool,
    numbers: int,
) -> Scores:
    """What is known of hidden[positions], without a gradient.

    Sums of exponentials are rescaled from tile to tile (Milakov & Gimelshein 2018,
    https://arxiv.org/abs/1805.02867, algorithm 3).

    numbers: logits held at a time.
    """
    weight_VD = layer.weight
    tile = min(_TILE.get(weight_VD.device.type, len(weight_VD)), len(weight_VD))
    size = max(SMALLEST_CHUNK, numbers // tile)
    buffer = LogitsBuffer(layer, min(size, len(positions_N)), tile)
    found = [hidden_PD.new_zeros(3, 0, dtype=torch.float32)]
    for start in range(0, len(positions_N), size):
        span = slice(start, start + size)
        hidden = hidden_PD[positions_N[span]]
        found.append(_score_by_tiles(hidden, layer, targets_N[span], with_top, tile, buffer))
    return Scores(*torch.cat(found, 1))


def _score_by_tiles(
    hidden_ND: Float[Tensor, "N D"],
    layer: OutputLayer,
    targets_N: Int64[Tensor, " N"],
    with_top: bool,
    tile: int,
    buffer: LogitsBuffer,
) -> Float32[Tensor, "3 N"]:
    """[logprobs, logsumexps, tops], of positions whose tiles fit in the buffer."""
    of_targets = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
    sums, tops = torch.zeros_like(of_targets), torch.zeros_like(of_targets)
    largest = torch.full_like(of_targets, -torch.inf)
    for first in range(0, len(layer.weight), tile):
        logits = buffer.fill(hidden_ND, layer, slice(first, first + tile))
        ids = targets_N - first
        is_here = (ids >= 0) & (ids < logits.shape[1])
        here = logits.gather(1, ids.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        of_targets = torch.where(is_here, here, of_targets)
        larger = torch.maximum(largest, logits.amax(-1))
        if with_top:
            tops = torch.where(larger > largest, (logits.argmax(-1) == ids).float(), tops)
        # In place: torch's logsumexp makes a second tile.
        sums = sums * (largest - larger).exp() + logits.sub_(larger[:, None]).exp_().sum(-1)
        largest = larger
    logsumexps = largest + sums.log()
    return torch.stack([of_targets - logsumexps, logsumexps, tops])
