"""Step g: Liger's kernels compute what their formulas say, forward and backward; and a model with
them has the loss and the gradient that it has without.

Each against the formula in float64, of the same numbers. On a GPU the kernels that Triton compiles;
without one Triton's interpreter runs the same sources with NumPy, one program after another.
"""

import os
import sys

# Triton reads it when it is imported, and torch imports Triton.
os.environ["TRITON_INTERPRET"] = "1" if "cpu" in sys.argv else "0"

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from check_training import TOLERANCES as MODEL_TOLERANCES
from check_training import exact_loss_and_gradient, our_loss_and_gradient
from made_up import SHAPES, MadeUpRows, random_model
from step import Step, start, without_liger
from torch import Tensor
from torch.nn.functional import silu

# Of the norm of a result: the norm of the difference. bfloat16 keeps 8 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# The interpreter adds the bits of bfloat16 as integers (Triton 3.7.1).
INTERPRETED = (torch.float32,)
EPSILON = 1e-5
IGNORED = -100


@dataclass(frozen=True)
class Kernel:
    """shapes: of the inputs. formula, kernel: from them to the results; the first in float64."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    formula: Callable[..., tuple[Tensor, ...]]
    kernel: Callable[..., tuple[Tensor, ...]]


def main() -> None:
    step = start(__doc__)
    if reason := without_liger():
        step.skip("Liger's kernels", reason)
        return
    from post_training.models.device import be_deterministic

    be_deterministic()
    if not step.has_gpu:
        interpret()
    for kernel in kernels(step):
        for dtype in TOLERANCES if step.has_gpu else INTERPRETED:
            what = f"{kernel.name}, {str(dtype).removeprefix('torch.')}"
            step.attempt(what, partial(_check, kernel, dtype, step.device))
    step.attempt("a Llama with Liger's kernels, float32", partial(_check_model, step))


def interpret() -> None:
    """Add what Triton's interpreter lacks (3.7.1): a float that a kernel is given becomes a float32
    scalar, as when it is compiled; and `rsqrt` of CUDA's libdevice, which has no source, is
    Triton's own."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    of_others = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if not isinstance(argument, float):
            return of_others(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted
    from liger_kernel.ops import layer_norm, rms_norm

    for module in (layer_norm, rms_norm):
        # Looked up at the call: the interpreter puts its own functions into tl meanwhile.
        module.rsqrt = lambda values: tl.rsqrt(values)


def kernels(step: Step) -> list[Kernel]:
    """Of sizes that are no powers of two: the kernels compute in blocks that are, and mask the
    rest."""
    from liger_kernel.ops import (
        LigerCrossEntropyFunction,
        LigerFusedLinearCrossEntropyFunction,
        LigerLayerNormFunction,
        LigerRMSNormFunction,
        LigerSiLUMulFunction,
    )
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    rows, width, vocabulary = step.pick((512, 4000, 128_256), (6, 200, 1000))
    length, size = step.pick((512, 128), (5, 16))
    targets = torch.arange(rows, device=step.device) * 7 % vocabulary
    targets[1] = IGNORED
    cosine, sine = _rotations(length, size, step.device)

    def nats(logits: Tensor) -> tuple[Tensor, ...]:
        kept = targets != IGNORED
        chosen = logits.log_softmax(-1)[kept].gather(1, targets[kept, None])
        return (-chosen.mean(),)

    return [
        Kernel(
            "RMSNorm",
            ((rows, width), (width,)),
            lambda x, weight: (_over_root_mean_square(x) * weight,),
            lambda x, weight: (LigerRMSNormFunction.apply(x, weight, EPSILON),),
        ),
        Kernel(
            "LayerNorm",
            ((rows, width), (width,), (width,)),
            lambda x, weight, bias: (_over_standard_deviation(x) * weight + bias,),
            lambda x, weight, bias: (LigerLayerNormFunction.apply(x, weight, bias, EPSILON),),
        ),
        Kernel(
            "SwiGLU",
            ((rows, width), (rows, width)),
            lambda gate, up: (silu(gate) * up,),
            lambda gate, up: (LigerSiLUMulFunction.apply(gate, up),),
        ),
        Kernel(
            "rotary embedding",
            ((1, 4, length, size), (1, 2, length, size)),
            lambda *heads: tuple(x * cosine + _turned(x) * sine for x in heads),
            # As models call it: a transposed view of [B, T, H, D].
            lambda *heads: liger_rotary_pos_emb(
                *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads),
                cosine.to(heads[0].dtype),
                sine.to(heads[0].dtype),
            ),
        ),
        Kernel(
            "cross entropy",
            ((rows, vocabulary),),
            nats,
            lambda logits: LigerCrossEntropyFunction.apply(logits, targets, None, IGNORED)[:1],
        ),
        Kernel(
            "output layer and cross entropy",
            ((rows, step.pick(1000, 60)), (vocabulary, step.pick(1000, 60))),
            lambda hidden, weight: nats(hidden @ weight.T),
            lambda hidden, weight: LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, targets
            )[:1],
        ),
    ]


def _check(kernel: Kernel, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """forward: of the results; backward: of the inputs' gradients. The norm of the difference from
    float64, as a share of the norm; the largest of each."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in kernel.shapes]
    rounded = [each.to(dtype) for each in drawn]
    exact = [each.double().requires_grad_() for each in rounded]
    given = [each.requires_grad_() for each in rounded]
    expected = kernel.formula(*exact)
    # Copies: some kernels write into what they are given.
    results = kernel.kernel(*(each.clone() for each in given))
    weights = [torch.randn(each.shape, generator=generator, device=device) for each in expected]
    weights = [each.to(dtype) for each in weights]
    torch.autograd.backward(expected, [each.double() for each in weights])
    # Before the backward pass, which writes into the results too.
    forward = max(map(_apart, results, expected))
    torch.autograd.backward(results, weights)
    backward = max(_apart(x.grad, y.grad) for x, y in zip(given, exact, strict=True))
    good = max(forward, backward) <= TOLERANCES[dtype]
    return {"good": good, "forward": forward, "backward": backward, "tolerance": TOLERANCES[dtype]}


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def _over_root_mean_square(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()


def _over_standard_deviation(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return _over_root_mean_square(centred)


def _rotations(length: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines of [1, length, size] in float64, of numbers that bfloat16 has."""
    frequencies = 10_000.0 ** -(torch.arange(0, size, 2, device=device).double() / size)
    angles = torch.arange(length, device=device)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos().bfloat16().double(), angles.sin().bfloat16().double()


def _turned(x: Tensor) -> Tensor:
    """The second half of the last dimension negated and before the first."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _check_model(step: Step) -> dict[str, Any]:
    """All that `training.use_liger_kernel` puts into a Llama, at once; tolerances as in step a."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    from post_training.models.head import ChunkedHead
    from post_training.train.arguments import LIGER

    of_loss, of_gradient = MODEL_TOLERANCES["float32"]
    rows = MadeUpRows(1, (5, 40, 19), SHAPES["tiny"]["vocab_size"])
    model = random_model(SHAPES["tiny"], step.device, torch.bfloat16)
    exact, exact_gradient = exact_loss_and_gradient(model.cpu().double(), rows)
    model = random_model(SHAPES["tiny"], step.device, torch.bfloat16).float()
    _apply_liger_kernel_to_instance(model=model, **LIGER)
    loss, gradient = our_loss_and_gradient(model, ChunkedHead.install(model), rows, packed=True)
    loss_error, gradient_error = abs(loss - exact) / exact, _apart(gradient, exact_gradient)
    return {
        "good": loss_error <= of_loss and gradient_error <= of_gradient,
        "loss": loss,
        "loss_in_float64": exact,
        "loss_error": loss_error,
        "gradient_error": gradient_error,
    }


if __name__ == "__main__":
    main()
