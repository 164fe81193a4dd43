"""A model of 16 bits that computes in float32 for a while, without a second copy of it in memory.

What a trial compares is then the model's own doing, and not lost in rounding. bfloat16 keeps 8 bits
of a number, so a small leak between two sequences and rounding look alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_OF_16_BITS = (torch.bfloat16, torch.float16)


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Weights of 16 bits are float32 while the part that they belong to computes: one layer, the
    embedding, or the output layer. So there is at most one such part more in memory. Afterwards all
    weights are the tensors that they were.
    """
    before: dict[Tensor, Tensor] = {}

    def widen(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.dtype in _OF_16_BITS:
                before[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def narrow(tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor in before:
                tensor.data = before.pop(tensor)

    hooks = []
    for part, tensors in _parts(model):
        hooks += [
            part.register_forward_pre_hook(lambda *_, own=tensors: widen(own)),
            part.register_forward_hook(lambda *_, own=tensors: narrow(own), always_call=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        narrow(list(before))


def _parts(module: nn.Module) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Modules and the weights that their forward pass reads. A layer is one part, as it may read
    weights of the modules in it without calling them."""
    if own := [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        yield module, own
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                yield layer, [*layer.parameters(), *layer.buffers()]
        else:
            yield from _parts(child)
