"""Logits of some positions, a part at a time, and what is known of them without a gradient.

A chunk is some of the positions. Where no gradient is made along with it, the logits of a position
need not be together: a CPU multiplies many positions with a tile of the vocabulary, which stays in
its cache, in half the time of few positions with all of it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from post_training.models.logit_scaling import LogitScaling

# Ids of the vocabulary in a tile; elsewhere all of them. On a CPU 4096 and 16384 were slower. Tests
# make it small, so that the vocabulary of a tiny model has several.
_TILE = {"cpu": 8192}
SMALLEST_CHUNK = 16  # positions
_ALL = slice(None)


@dataclass(frozen=True)
class OutputLayer:
    """The output layer: its weight in the dtype of the matrix products, its bias or None, and what
    the model does after it."""

    weight: Float[Tensor, "V D"]
    bias: Float32[Tensor, " V"] | None
    scaling: LogitScaling


class LogitsBuffer:
    """Room for [rows, columns] logits: a new one for each part costs a CPU a tenth of its time,
    and two of them are there at a time."""

    def __init__(self, weight_VD: Float[Tensor, "V D"], rows: int, columns: int):
        self._products = weight_VD.new_empty(rows * columns)
        self._logits = self._products
        if weight_VD.dtype != torch.float32:
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
        torch.mm(hidden_ND, weight_VD.T, out=products)
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
    buffer = LogitsBuffer(weight_VD, min(size, len(positions_N)), tile)
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
