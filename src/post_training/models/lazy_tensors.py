"""Tensors that are read when they are needed, and dropped once they are written.

A conversion is a list of (name, LazyTensor): each one is read, cut or joined, written, and freed
before the next. Memory is a few times the largest tensor, whatever the size of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from post_training.core.errors import PostTrainingError


@dataclass(frozen=True)
class LazyTensor:
    """shape, dtype: of what `read` returns. read: from its file, each time it is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """[stop - start, …] of [rows, …]."""
        return LazyTensor(
            (stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop]
        )

    def cast(self, dtype: torch.dtype, name: str) -> "LazyTensor":
        """Rounded to nearest; integers, which are no weights, stay as they are.

        Errors: PostTrainingError, when it is read, for values that the dtype can't hold."""
        if dtype == self.dtype or not self.dtype.is_floating_point:
            return self
        return LazyTensor(self.shape, dtype, lambda: round_to(self.read(), dtype, name))

    def reorder_rows(self, indices: Tensor) -> "LazyTensor":
        """The rows at these indices, [len(indices), …]."""
        shape = (len(indices), *self.shape[1:])
        return LazyTensor(shape, self.dtype, lambda: self.read()[indices])

    def padded_rows(self, number: int) -> "LazyTensor":
        """[number, …]: rows of zeros behind its own."""

        def read() -> Tensor:
            own = self.read()
            return torch.cat([own, own.new_zeros(number - len(own), *own.shape[1:])])

        return (
            self
            if number == self.shape[0]
            else LazyTensor((number, *self.shape[1:]), self.dtype, read)
        )


def round_to(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Errors: PostTrainingError for values of the tensor `name` that would become infinite."""
    rounded = values.to(dtype)
    # In float16 the largest is 65504. In the others it is beyond what a weight can be.
    if dtype == torch.float16 and not rounded.isfinite().all() and values.isfinite().all():
        raise PostTrainingError(
            f"{name} has values up to {values.abs().max().item():.6g}, and float16 ends at 65504",
            hint="set dtype to bfloat16 or float32",
        )
    return rounded


def concatenate(parts: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """The parts, which differ in this dimension alone, one behind the other."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)

    def read() -> Tensor:
        # Into place one by one: all parts and the whole at once would be twice the tensor.
        whole = torch.empty(shape, dtype=parts[0].dtype)
        for part, place in zip(
            parts, whole.split([part.shape[dim] for part in parts], dim), strict=True
        ):
            place.copy_(part.read())
        return whole

    return LazyTensor(tuple(shape), parts[0].dtype, read)


def sum_of(parts: Sequence[LazyTensor], divisor: int = 1) -> LazyTensor:
    """Σ parts / divisor, added in float64 and rounded once. All parts have one shape and dtype."""
    if len(parts) == 1 and divisor == 1:
        return parts[0]

    def read() -> Tensor:
        total = parts[0].read().double()
        for part in parts[1:]:
            total += part.read()
        return (total / divisor).to(parts[0].dtype)

    return LazyTensor(parts[0].shape, parts[0].dtype, read)
