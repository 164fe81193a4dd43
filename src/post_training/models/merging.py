"""The weights of several models of one architecture made into one, tensor by tensor.

θ_i: a tensor of model i; w_i: its weight; θ_0: the base; δ_i = θ_i − θ_0; λ: the scale; d_i: the
density. Everything is computed in float64 and rounded once, to the dtype that is written.

    linear           Σ w_i θ_i / Σ w_i                                          (Wortsman 2022)
    slerp            sin((1 − t) Ω) / sin Ω θ_1 + sin(t Ω) / sin Ω θ_2, Ω the angle between the two
                     as vectors; straight on where |cos Ω| > 0.9995             (Shoemake 1985)
    task_arithmetic  θ_0 + λ Σ w_i δ_i                                          (Ilharco 2023)
    ties             θ_0 + λ Σ w_i δ_i / Σ w_i, over the i whose δ_i, cut to its d_i largest
                     values, has the sign of Σ w_i δ_i                          (Yadav 2023)
    dare_linear      task_arithmetic with each value of δ_i kept with probability d_i, and
                     divided by d_i                                             (Yu 2024)
    dare_ties        ties with that in place of the cut

Where a sum of weights is divided by and is 0, nothing is added to the base. These are mergekit's
formulas and defaults (0.1.5); it is no part of the images, since it computes in the dtype of the
weights, draws DARE's masks in the order in which it comes to tensors, and keeps no digests.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from post_training.models.lazy_tensors import LazyTensor, round_to

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
_STRAIGHT_ABOVE = 0.9995
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class Merge:
    """What is computed. weights, densities: of each model. t, scale, seed: as above; the seed draws
    the masks of DARE."""

    method: Method
    weights: Sequence[float]
    densities: Sequence[float]
    t: float = 0.5
    scale: float = 1.0
    seed: int = 0


def merge_tensor(
    merge: Merge,
    name: str,
    models: Sequence[LazyTensor],
    base: LazyTensor | None,
    dtype: torch.dtype,
) -> LazyTensor:
    """models: the tensor `name` of each, all of one shape. base: None for linear and slerp.

    Memory while it is read: up to 8 bytes × (number of models + 3) for each value of the tensor.
    """

    def read() -> Tensor:
        values = [model.read().double() for model in models]
        if merge.method == "linear":
            return round_to(_weighted_mean(values, merge.weights), dtype, name)
        if merge.method == "slerp":
            return round_to(slerp(values[0], values[1], merge.t), dtype, name)
        assert base is not None
        start = base.read().double()
        differences = [value.sub_(start) for value in values]
        change = _change(merge, name, differences)
        return round_to(start + merge.scale * change, dtype, name)

    return LazyTensor(models[0].shape, dtype, read)


def _weighted_mean(values: list[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += weight * value
    return total / sum(weights)


def slerp(one: Tensor, other: Tensor, t: float) -> Tensor:
    """Along the great circle from `one` (t = 0) to `other` (t = 1), both as whole vectors."""
    norms = [max(each.norm().item(), _SMALLEST_NORM) for each in (one, other)]
    cosine = ((one / norms[0]) * (other / norms[1])).sum()
    if cosine.abs() > _STRAIGHT_ABOVE:
        return (1 - t) * one + t * other
    angle = torch.arccos(cosine)
    return (torch.sin((1 - t) * angle) * one + torch.sin(t * angle) * other) / torch.sin(angle)


def _change(merge: Merge, name: str, differences: list[Tensor]) -> Tensor:
    """Σ over the models, before the scale."""
    if merge.method != "task_arithmetic":
        sparse = []
        for index, (values, density) in enumerate(zip(differences, merge.densities, strict=True)):
            if merge.method == "ties":
                sparse.append(largest(values, density))
            else:
                kept = keep_at_random(values.shape, density, merge.seed, name, index)
                sparse.append(values * kept / density)
        differences = sparse
    if merge.method in ("task_arithmetic", "dare_linear"):
        total = torch.zeros_like(differences[0])
        for values, weight in zip(differences, merge.weights, strict=True):
            total += weight * values
        return total
    return _with_one_sign(differences, merge.weights)


def _with_one_sign(differences: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Where models disagree on the sign of a change, those of the heavier side alone count."""
    elected = torch.zeros_like(differences[0])
    for values, weight in zip(differences, weights, strict=True):
        elected += weight * values
    elected = torch.where(elected >= 0, 1.0, -1.0).to(torch.float64)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for values, weight in zip(differences, weights, strict=True):
        agrees = (values * weight).sign() == elected
        total += torch.where(agrees, weight * values, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    return torch.where(divisor.abs() < _SMALLEST_NORM, 0.0, total / divisor)


def largest(values: Tensor, density: float) -> Tensor:
    """The int(density × number) values of largest magnitude, the first ones of those that are
    equal; the others are 0."""
    number = int(density * values.numel())
    if number == values.numel():
        return values
    if number == 0:
        return torch.zeros_like(values)
    magnitudes = values.abs().flatten()
    limit = magnitudes.kthvalue(values.numel() - number + 1).values
    above = magnitudes > limit
    equal = magnitudes == limit
    kept = above | (equal & (equal.cumsum(0) <= number - above.sum()))
    return torch.where(kept.reshape(values.shape), values, 0.0)


def keep_at_random(
    shape: Sequence[int], density: float, seed: int, name: str, index: int
) -> Tensor:
    """True with probability `density`: the same for a tensor's name, whatever is merged before."""
    digest = hashlib.sha256(f"{seed}/{index}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) < density
