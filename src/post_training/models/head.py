"""The last layer of a language model, without ever holding its logits as a whole.

`ChunkedHead.install(model)` gives the model's output layer another forward. Inside `scoring(…)` it
makes the logits of the asked positions a part at a time, takes from them what is wanted, in
float32, and drops them; outside it is the layer that it was. The layer is still called as a module
of its model, so whatever hangs on that (gathering of sharded weights, autocast) still works, and
what it computes comes out of the model as `outputs.logits`.

    P positions of a batch, B·T; N of them asked for; D hidden size, V vocabulary
    z_NV = scaling(hidden_ND · weight_VDᵀ + bias_V)      bias and scaling: where the family has them
    logprob_n = z[n, target_n] − V_n,   V_n = log Σ_v exp z[n, v]

A loss Σ_n c_n · −logprob_n whose c_n are known beforehand is differentiated while the chunk is at
hand: dz = c · (softmax z − onehot), times the slope of the scaling (logit_scaling.py). That is
three matrix products for loss and gradient, as with full logits. Any other use of logprob and V
needs a fourth: the backward pass makes the chunk again.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from post_training.core.errors import PostTrainingError, UsageError
from post_training.models.logit_scaling import LogitScaling, find_logit_scaling
from post_training.models.logits import (
    SMALLEST_CHUNK,
    LogitsBuffer,
    OutputLayer,
    score_positions,
)

IGNORED = -100
# Logits of a chunk, in numbers: 128 MiB on a CPU, where 256 positions of a vocabulary of 131072
# were the fastest; larger products suit a GPU better.
_CHUNK_NUMBERS = {"cpu": 2**25}
_CHUNK_NUMBERS_ELSEWHERE = 2**27


class ChunkedHead:
    """What `install` returns. One forward of the model belongs into each `scoring`."""

    def __init__(
        self,
        layer: torch.nn.Linear,
        scaling: LogitScaling,
        *,
        has_fewer_ids: bool = False,
        float32_logits: bool = False,
    ):
        """has_fewer_ids: than the model embeds."""
        self._request: _Request | None = None
        plain_forward = layer.forward

        # Under torch.compile the backbone is compiled, and these loops are not.
        @torch.compiler.disable
        def forward(layer: torch.nn.Linear, hidden: Float[Tensor, "B T D"]) -> Any:
            if self._request is None:
                return plain_forward(hidden)
            if has_fewer_ids:
                _check_targets(self._request.targets, layer.out_features)
            return _answer_request(
                hidden, layer.weight, layer.bias, scaling, float32_logits, self._request
            )

        layer.forward = types.MethodType(forward, layer)

    @classmethod
    def install(cls, model: PreTrainedModel, *, float32_logits: bool = False) -> "ChunkedHead":
        """float32_logits: not rounded to the dtype of the products (logits.OutputLayer).

        Errors: UsageError for a model that makes its logits otherwise than by a linear layer,
        a factor and a soft cap."""
        layer = model.get_output_embeddings()
        if not isinstance(layer, torch.nn.Linear):
            raise UsageError(
                f"models of the type {model.config.model_type} have no output layer that the loss "
                "knows",
                where="model",
            )
        has_fewer_ids = layer.out_features < model.get_input_embeddings().num_embeddings
        return cls(
            layer,
            find_logit_scaling(model),
            has_fewer_ids=has_fewer_ids,
            float32_logits=float32_logits,
        )

    @contextmanager
    def scoring(
        self,
        targets: Int64[Tensor, "B T"],
        coefficients: Float32[Tensor, "B T"] | None = None,
        *,
        with_top: bool = False,
        chunk_numbers: int | None = None,
    ) -> Iterator[None]:
        """Make `outputs.logits` of the model's forward a HeadOutput of float32 tensors.

        Without coefficients: (logprobs [B, T], logsumexps [B, T], tops [B, T]), of which the first
        two are differentiable. With them: (loss [], logprobs, tops), of which the loss is;
        loss = Σ coefficients · −logprobs, a sum over the positions whose coefficient is not 0,
        which alone are looked at.

        targets: the id that each position should predict; IGNORED positions are left out, and zero
        in what comes back.
        with_top: find out where the target is the likeliest id (tops: 1, else 0).
        chunk_numbers: logits of a chunk; by default what is fastest.
        """
        self._request = _Request(targets, coefficients, with_top, chunk_numbers)
        try:
            yield
        finally:
            self._request = None


@dataclass(frozen=True)
class _Request:
    targets: Int64[Tensor, "B T"]
    coefficients: Float32[Tensor, "B T"] | None
    with_top: bool
    chunk_numbers: int | None


def _check_targets(targets: Int64[Tensor, "B T"], num_ids: int) -> None:
    """Errors: PostTrainingError for an id that has no probability. Beyond the layer's weights, it
    would be an index error (on a GPU, an unreadable one)."""
    if (largest := int(targets.max())) >= num_ids:
        raise PostTrainingError(
            f"an answer holds the id {largest}, which the model can't give: its output layer has "
            f"{num_ids} ids",
            where="data",
            hint="leave out answers with tokens of images or sound",
        )


class HeadOutput(NamedTuple):
    """What `scoring` describes. The model's own lines after its output layer are already in it
    (LogitScaling): what they do to it leaves it as it is. A NamedTuple, since FSDP2 and DeepSpeed
    look for the tensors in what a model returns."""

    first: Tensor
    second: Tensor
    tops: Tensor

    def _unchanged(self, *_: Any, **__: Any) -> "HeadOutput":
        return self

    __mul__ = __rmul__ = __truediv__ = float = to = _unchanged

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return args[0]


def _answer_request(
    hidden_BTD: Float[Tensor, "B T D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    scaling: LogitScaling,
    float32_logits: bool,
    request: _Request,
) -> HeadOutput:
    asked = request.targets != IGNORED
    if request.coefficients is not None:
        asked &= request.coefficients != 0
    # Indices, as a boolean mask would be looked at again with each use.
    positions_N = asked.flatten().nonzero().squeeze(1)
    targets_N = request.targets.flatten()[positions_N]
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    numbers = request.chunk_numbers or _CHUNK_NUMBERS.get(device, _CHUNK_NUMBERS_ELSEWHERE)
    how = _How(scaling, dtype, float32_logits, request.with_top, numbers)
    arguments = (hidden_BTD, weight_VD, bias_V, positions_N, targets_N, how)

    def spread(values_N: Float32[Tensor, " N"]) -> Float32[Tensor, "B T"]:
        flat = values_N.new_zeros(asked.numel())
        return flat.index_copy(0, positions_N, values_N).view(asked.shape)

    if request.coefficients is None:
        logprobs_N, logsumexps_N, tops_N = _ScoresFunction.apply(*arguments)
        return HeadOutput(spread(logprobs_N), spread(logsumexps_N), spread(tops_N))
    coefficients_N = request.coefficients.flatten()[positions_N]
    loss, logprobs_N, tops_N = _WeightedLossFunction.apply(*arguments, coefficients_N)
    return HeadOutput(loss, spread(logprobs_N), spread(tops_N))


@dataclass(frozen=True)
class _How:
    """dtype: of the matrix products; None: that of the weight. numbers: logits held at a time."""

    scaling: LogitScaling
    dtype: torch.dtype | None
    float32_logits: bool
    with_top: bool
    numbers: int


@dataclass
class _Chunk:
    """Some of the positions. rows: their numbers among the P; span: among the N.
    logits: until the next chunk; the reader may overwrite them.
    slopes: of the scaling at the logits."""

    rows: Int64[Tensor, " n"]
    span: slice
    hidden: Float[Tensor, "n D"]
    logits: Float32[Tensor, "n V"]
    targets: Int64[Tensor, " n"]
    slopes: Float32[Tensor, "n V"] | float

    def softmax_(self, logsumexps: Float32[Tensor, " n"]) -> Float32[Tensor, "n V"]:
        """The probabilities, in the place of the logits."""
        return self.logits.sub_(logsumexps[:, None]).exp_()


class _Gradients:
    """Sums up d loss / d hidden, weight and bias, chunk after chunk, where they are wanted."""

    def __init__(
        self, hidden_PD: Float[Tensor, "P D"], layer: OutputLayer, needed: tuple[bool, ...]
    ):
        weight_VD = self._weight_VD = layer.weight
        self.hidden = torch.zeros_like(hidden_PD) if needed[0] else None
        # In float32 whatever the weights are: many small chunks are added up.
        self.weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None
        self.bias = weight_VD.new_zeros(len(weight_VD), dtype=torch.float32) if needed[2] else None

    def add(self, chunk: _Chunk, grad_logits: Float32[Tensor, "n V"]) -> None:
        """grad_logits: of the final logits; overwritten."""
        if isinstance(chunk.slopes, Tensor) or chunk.slopes != 1:
            grad_logits.mul_(chunk.slopes)
        if self.bias is not None:
            self.bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(self._weight_VD.dtype)
        if self.hidden is not None:
            self.hidden[chunk.rows] = grad_logits @ self._weight_VD
        if self.weight is None:
            return
        if grad_logits.dtype == torch.float32:
            self.weight.addmm_(grad_logits.T, chunk.hidden)
        else:
            self.weight += grad_logits.T @ chunk.hidden


class _WeightedLossFunction(torch.autograd.Function):
    """(Σ c · −logprob, logprobs [N], tops [N]); the gradient is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        positions_N: Tensor,
        targets_N: Tensor,
        how: _How,
        coefficients_N: Tensor,
    ) -> tuple[Tensor, ...]:
        needs_gradient = any(ctx.needs_input_grad[:3])
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, layer = _flatten(hidden_BTD, weight_VD, bias_V, how)
            gradients = _Gradients(hidden_PD, layer, ctx.needs_input_grad)
            results = []
            chunks = _make_chunks(
                hidden_PD, layer, positions_N, targets_N, how.numbers, with_slopes=needs_gradient
            )
            for chunk in chunks:
                logprobs, tops, sums = _score_chunk_(chunk, how.with_top)
                results.append(torch.stack([logprobs, tops]))
                if needs_gradient:
                    c = coefficients_N[chunk.span, None]
                    grad_logits = chunk.logits.mul_(c / sums[:, None])
                    grad_logits.scatter_add_(1, chunk.targets[:, None], -c)
                    gradients.add(chunk, grad_logits)
            none = coefficients_N.new_zeros(2, 0)
            logprobs_N, tops_N = torch.cat([none, *results], 1)
        ctx.gradients, ctx.shape = gradients, hidden_BTD.shape
        ctx.dtypes = hidden_BTD.dtype, weight_VD.dtype, getattr(bias_V, "dtype", None)
        ctx.mark_non_differentiable(logprobs_N, tops_N)
        # In float64 for a moment: a sum of many small terms.
        loss = -(coefficients_N.double() * logprobs_N.double()).sum().float()
        return loss, logprobs_N, tops_N

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return *_scale_gradients(ctx, gradients, grad_loss), *[None] * 4


class _ScoresFunction(torch.autograd.Function):
    """(logprobs [N], logsumexps [N], tops [N]); the backward pass makes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        positions_N: Tensor,
        targets_N: Tensor,
        how: _How,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, layer = _flatten(hidden_BTD, weight_VD, bias_V, how)
            found = score_positions(
                hidden_PD, layer, positions_N, targets_N, how.with_top, how.numbers
            )
        ctx.save_for_backward(
            hidden_BTD, weight_VD, bias_V, positions_N, targets_N, found.logsumexps
        )
        ctx.how, ctx.shape = how, hidden_BTD.shape
        ctx.dtypes = hidden_BTD.dtype, weight_VD.dtype, getattr(bias_V, "dtype", None)
        ctx.mark_non_differentiable(found.tops)
        return found.logprobs, found.logsumexps, found.tops

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_N: Tensor, grad_logsumexps_N: Tensor, _: Any
    ) -> tuple[Tensor | None, ...]:
        hidden_BTD, weight_VD, bias_V, positions_N, targets_N, logsumexps_N = ctx.saved_tensors
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, layer = _flatten(hidden_BTD, weight_VD, bias_V, ctx.how)
            gradients = _Gradients(hidden_PD, layer, ctx.needs_input_grad)
            chunks = _make_chunks(
                hidden_PD, layer, positions_N, targets_N, ctx.how.numbers, with_slopes=True
            )
            for chunk in chunks:
                of_logprobs = grad_logprobs_N[chunk.span, None]
                of_logsumexps = grad_logsumexps_N[chunk.span, None]
                grad_logits = chunk.softmax_(logsumexps_N[chunk.span])
                grad_logits.mul_(of_logsumexps - of_logprobs)
                grad_logits.scatter_add_(1, chunk.targets[:, None], of_logprobs)
                gradients.add(chunk, grad_logits)
        return *_scale_gradients(ctx, gradients, None), *[None] * 3


def _scale_gradients(
    ctx: Any, gradients: _Gradients, scale: Float32[Tensor, ""] | None
) -> tuple[Tensor | None, ...]:
    found = gradients.hidden, gradients.weight, gradients.bias
    for gradient in found:
        if gradient is not None and scale is not None:
            gradient.mul_(scale)
    hidden, *others = (
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(found, ctx.dtypes, strict=True)
    )
    return None if hidden is None else hidden.view(ctx.shape), *others


def _flatten(
    hidden_BTD: Float[Tensor, "B T D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    how: _How,
) -> tuple[Float[Tensor, "P D"], OutputLayer]:
    """hidden [B·T, D] and the layer, in the dtype of the matrix products."""
    dtype = how.dtype or weight_VD.dtype
    bias = None if bias_V is None else bias_V.float()
    layer = OutputLayer(weight_VD.to(dtype), bias, how.scaling, how.float32_logits)
    return hidden_BTD.flatten(0, 1).to(dtype), layer


def _make_chunks(
    hidden_PD: Float[Tensor, "P D"],
    layer: OutputLayer,
    positions_N: Int64[Tensor, " N"],
    targets_N: Int64[Tensor, " N"],
    numbers: int,
    *,
    with_slopes: bool,
) -> Iterator[_Chunk]:
    num_ids = len(layer.weight)
    size = max(SMALLEST_CHUNK, numbers // num_ids)
    buffer = LogitsBuffer(layer, min(size, len(positions_N)), num_ids)
    for start in range(0, len(positions_N), size):
        span = slice(start, start + size)
        rows = positions_N[span]
        hidden = hidden_PD[rows]
        logits = buffer.fill(hidden, layer)
        slopes = layer.scaling.slopes(logits) if with_slopes else 1.0
        yield _Chunk(rows, span, hidden, logits, targets_N[span], slopes)


def _score_chunk_(
    chunk: _Chunk, with_top: bool
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """(logprobs, tops, sums). sums: of the exponentials that are now in the
    logits' place, exp(z − max z)."""
    # torch's logsumexp makes a second [n, V], and the softmax after it all the exponentials again:
    # together three times the time of this.
    of_targets = chunk.logits.gather(1, chunk.targets[:, None]).squeeze(1)
    tops = torch.zeros_like(of_targets)
    if with_top:
        tops = (chunk.logits.argmax(-1) == chunk.targets).float()
    largest = chunk.logits.amax(-1)
    sums = chunk.logits.sub_(largest[:, None]).exp_().sum(-1)
    return of_targets - (largest + sums.log()), tops, sums
