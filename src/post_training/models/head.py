"""The last layer of a language model, without ever holding its logits as a whole.

`ChunkedHead.install(model)` gives the model's output layer another forward. Inside `scoring(…)` it
makes the logits of the asked positions a part at a time, takes from them what is wanted, in
float32, and drops them; outside it is the layer that it was. The layer is still called as a module
of its model, so whatever hangs on that (gathering of sharded weights, autocast) still works, and
what it computes comes out of the model as `outputs.logits`.

    P positions of a batch, B·T; N of them asked for; D hidden size, V vocabulary
    z_NV = hidden_ND · weight_VDᵀ
    logprob_n = z[n, target_n] − V_n,   V_n = log Σ_v exp z[n, v]

A loss Σ_n c_n · −logprob_n whose c_n are known beforehand is differentiated while the chunk is at
hand: dz = c · (softmax z − onehot). That is three matrix products for loss and gradient, as with
full logits. Any other use of logprob and V needs a fourth: the backward pass makes the chunk again.

A chunk is some of the positions. Where no gradient is made along with it, the logits of a position
need not be together: a CPU multiplies many positions with a tile of the vocabulary, which stays in
its cache, in half the time of few positions with all of it.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from post_training.core.errors import UsageError

IGNORED = -100
# Logits of a chunk, in numbers: 128 MiB on a CPU, where 256 positions of a vocabulary of 131072
# were the fastest; larger products suit a GPU better.
_CHUNK_NUMBERS = {"cpu": 2**25}
_CHUNK_NUMBERS_ELSEWHERE = 2**27
# Settings by which some families bend their logits after this layer; not one of ours does.
_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
# Ids of the vocabulary in a tile; elsewhere all of them. On a CPU 4096 and 16384 were slower.
_TILE = {"cpu": 8192}
SMALLEST_CHUNK = 16


class ChunkedHead:
    """What `install` returns. One forward of the model belongs into each `scoring`."""

    def __init__(self, layer: torch.nn.Module):
        self._request: _Request | None = None
        plain_forward = layer.forward

        # Under torch.compile the backbone is compiled, and these loops are not.
        @torch.compiler.disable
        def forward(layer: torch.nn.Linear, hidden: Tensor) -> Any:
            if self._request is None:
                return plain_forward(hidden)
            return _answer_request(hidden, layer.weight, self._request)

        layer.forward = types.MethodType(forward, layer)

    @classmethod
    def install(cls, model: PreTrainedModel) -> "ChunkedHead":
        """Errors: UsageError for a model whose logits are more than hidden · weightᵀ."""
        layer = model.get_output_embeddings()
        settings = model.config.get_text_config()
        bent = [name for name in _LOGIT_SETTINGS if getattr(settings, name, None) is not None]
        if getattr(layer, "bias", None) is not None:
            bent.append("a bias in the output layer")
        if bent:
            raise UsageError(
                f"{bent[0]}: the loss does not know such models ({settings.model_type})",
                where="model",
                hint="models of the Llama and Apertus type have plain logits",
            )
        return cls(layer)

    @contextmanager
    def scoring(
        self,
        targets: Tensor,
        coefficients: Tensor | None = None,
        *,
        with_top: bool = False,
        chunk_numbers: int | None = None,
    ) -> Iterator[None]:
        """Make `outputs.logits` of the model's forward a tuple of float32 tensors.

        Without coefficients: (logprobs [B, T], logsumexps [B, T], tops [B, T]), of which the first
        two are differentiable. With them: (loss [], logprobs, tops), of which the loss is;
        loss = Σ coefficients · −logprobs, a sum over the positions whose coefficient is not 0,
        which alone are looked at.

        targets: int64 [B, T], the id that each position should predict; IGNORED positions are left
        out, and zero in what comes back.
        coefficients: float32 [B, T].
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
    targets: Tensor
    coefficients: Tensor | None
    with_top: bool
    chunk_numbers: int | None


def _answer_request(hidden_BTD: Tensor, weight_VD: Tensor, request: _Request) -> tuple[Tensor, ...]:
    asked = request.targets != IGNORED
    if request.coefficients is not None:
        asked &= request.coefficients != 0
    # Indices, as a boolean mask would be looked at again with each use.
    positions_N = asked.flatten().nonzero().squeeze(1)
    targets_N = request.targets.flatten()[positions_N]
    device = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    numbers = request.chunk_numbers or _CHUNK_NUMBERS.get(device, _CHUNK_NUMBERS_ELSEWHERE)
    arguments = (hidden_BTD, weight_VD, positions_N, targets_N, dtype, request.with_top, numbers)

    def spread(values_N: Tensor) -> Tensor:
        flat = values_N.new_zeros(asked.numel())
        return flat.index_copy(0, positions_N, values_N).view(asked.shape)

    if request.coefficients is None:
        logprobs_N, logsumexps_N, tops_N = _ScoresFunction.apply(*arguments)
        return spread(logprobs_N), spread(logsumexps_N), spread(tops_N)
    coefficients_N = request.coefficients.flatten()[positions_N]
    loss, logprobs_N, tops_N = _WeightedLossFunction.apply(*arguments, coefficients_N)
    return loss, spread(logprobs_N), spread(tops_N)


@dataclass
class _Chunk:
    """Some of the positions. rows: their numbers among the P; span: among the N.
    logits: float32 [n, V], until the next chunk; the reader may overwrite them."""

    rows: Tensor
    span: slice
    hidden: Tensor
    logits: Tensor
    targets: Tensor

    def softmax_(self, logsumexps: Tensor) -> Tensor:
        """The probabilities [n, V], in the place of the logits."""
        return self.logits.sub_(logsumexps[:, None]).exp_()


class _Gradients:
    """Sums up d loss / d hidden and d loss / d weight, chunk after chunk, where they are wanted."""

    def __init__(self, hidden_PD: Tensor, weight_VD: Tensor, needed: tuple[bool, ...]):
        self._weight_VD = weight_VD
        self.hidden = torch.zeros_like(hidden_PD) if needed[0] else None
        # In float32 whatever the weights are: many small chunks are added up.
        self.weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None

    def add(self, chunk: _Chunk, grad_logits: Tensor) -> None:
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
        ctx, hidden_BTD, weight_VD, positions_N, targets_N, dtype, with_top, numbers, coefficients_N
    ):
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, weight = _flatten(hidden_BTD, weight_VD, dtype)
            gradients = _Gradients(hidden_PD, weight, ctx.needs_input_grad)
            results = []
            for chunk in _make_chunks(hidden_PD, weight, positions_N, targets_N, numbers):
                logprobs, tops, sums = _score_chunk_(chunk, with_top)
                results.append(torch.stack([logprobs, tops]))
                if any(ctx.needs_input_grad[:2]):
                    c = coefficients_N[chunk.span, None]
                    grad_logits = chunk.logits.mul_(c / sums[:, None])
                    grad_logits.scatter_add_(1, chunk.targets[:, None], -c)
                    gradients.add(chunk, grad_logits)
            none = coefficients_N.new_zeros(2, 0)
            logprobs_N, tops_N = torch.cat([none, *results], 1)
        ctx.gradients, ctx.shape = gradients, hidden_BTD.shape
        ctx.dtypes = hidden_BTD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(logprobs_N, tops_N)
        # In float64 for a moment: a sum of many small terms.
        loss = -(coefficients_N.double() * logprobs_N.double()).sum().float()
        return loss, logprobs_N, tops_N

    @staticmethod
    def backward(ctx, grad_loss, *_):
        gradients, ctx.gradients = ctx.gradients, None
        return *_scale_gradients(ctx, gradients, grad_loss), *[None] * 6


class _ScoresFunction(torch.autograd.Function):
    """(logprobs [N], logsumexps [N], tops [N]); the backward pass makes the logits again."""

    @staticmethod
    def forward(ctx, hidden_BTD, weight_VD, positions_N, targets_N, dtype, with_top, numbers):
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, weight = _flatten(hidden_BTD, weight_VD, dtype)
            found = score_positions(hidden_PD, weight, positions_N, targets_N, with_top, numbers)
        ctx.save_for_backward(hidden_BTD, weight_VD, positions_N, targets_N, found.logsumexps)
        ctx.dtype, ctx.numbers, ctx.shape = dtype, numbers, hidden_BTD.shape
        ctx.dtypes = hidden_BTD.dtype, weight_VD.dtype
        ctx.mark_non_differentiable(found.tops)
        return found.logprobs, found.logsumexps, found.tops

    @staticmethod
    def backward(ctx, grad_logprobs_N, grad_logsumexps_N, _):
        hidden_BTD, weight_VD, positions_N, targets_N, logsumexps_N = ctx.saved_tensors
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_PD, weight = _flatten(hidden_BTD, weight_VD, ctx.dtype)
            gradients = _Gradients(hidden_PD, weight, ctx.needs_input_grad)
            for chunk in _make_chunks(hidden_PD, weight, positions_N, targets_N, ctx.numbers):
                of_logprobs = grad_logprobs_N[chunk.span, None]
                of_logsumexps = grad_logsumexps_N[chunk.span, None]
                grad_logits = chunk.softmax_(logsumexps_N[chunk.span])
                grad_logits.mul_(of_logsumexps - of_logprobs)
                grad_logits.scatter_add_(1, chunk.targets[:, None], of_logprobs)
                gradients.add(chunk, grad_logits)
        return *_scale_gradients(ctx, gradients, None), *[None] * 5


def _scale_gradients(
    ctx: Any, gradients: _Gradients, scale: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden, weight = gradients.hidden, gradients.weight
    for gradient in (hidden, weight):
        if gradient is not None and scale is not None:
            gradient.mul_(scale)
    return (
        None if hidden is None else hidden.view(ctx.shape).to(ctx.dtypes[0]),
        None if weight is None else weight.to(ctx.dtypes[1]),
    )


def _flatten(
    hidden_BTD: Tensor, weight_VD: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """hidden [B·T, D] and the weight, in the dtype of the matrix products."""
    dtype = dtype or weight_VD.dtype
    return hidden_BTD.flatten(0, 1).to(dtype), weight_VD.to(dtype)


class LogitsBuffer:
    """Room for [rows, columns] logits: a new one for each part costs a CPU a tenth of its time,
    and two of them are there at a time."""

    def __init__(self, weight_VD: Tensor, rows: int, columns: int):
        self._products = weight_VD.new_empty(rows * columns)
        self._logits = self._products
        if weight_VD.dtype != torch.float32:
            self._logits = torch.empty_like(self._products, dtype=torch.float32)

    def fill(self, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        """float32 [N, V], until the next filling; the reader may overwrite them."""
        shape = len(hidden_ND), len(weight_VD)
        products, logits = (
            flat[: shape[0] * shape[1]].view(shape) for flat in (self._products, self._logits)
        )
        torch.mm(hidden_ND, weight_VD.T, out=products)
        return logits if self._logits is self._products else logits.copy_(products)


def _make_chunks(
    hidden_PD: Tensor, weight_VD: Tensor, positions_N: Tensor, targets_N: Tensor, numbers: int
) -> Iterator[_Chunk]:
    size = max(SMALLEST_CHUNK, numbers // len(weight_VD))
    buffer = LogitsBuffer(weight_VD, min(size, len(positions_N)), len(weight_VD))
    for start in range(0, len(positions_N), size):
        span = slice(start, start + size)
        rows = positions_N[span]
        hidden = hidden_PD[rows]
        yield _Chunk(rows, span, hidden, buffer.fill(hidden, weight_VD), targets_N[span])


def _score_chunk_(chunk: _Chunk, with_top: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, tops, sums), each float32 [n]. sums: of the exponentials that are now in the
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


@dataclass
class Scores:
    """Each float32 [N]. tops: 1 where the target is the likeliest id, else 0; zeros when nobody
    asked."""

    logprobs: Tensor
    logsumexps: Tensor
    tops: Tensor


def score_positions(
    hidden_PD: Tensor,
    weight_VD: Tensor,
    positions_N: Tensor,
    targets_N: Tensor,
    with_top: bool,
    numbers: int,
) -> Scores:
    """What is known of hidden[positions], without a gradient.

    Sums of exponentials are rescaled from tile to tile (Milakov & Gimelshein 2018,
    https://arxiv.org/abs/1805.02867, algorithm 3).

    numbers: logits held at a time.
    """
    tile = min(_TILE.get(weight_VD.device.type, len(weight_VD)), len(weight_VD))
    size = max(SMALLEST_CHUNK, numbers // tile)
    buffer = LogitsBuffer(weight_VD, min(size, len(positions_N)), tile)
    found = [hidden_PD.new_zeros(3, 0, dtype=torch.float32)]
    for start in range(0, len(positions_N), size):
        span = slice(start, start + size)
        hidden = hidden_PD[positions_N[span]]
        found.append(_score_by_tiles(hidden, weight_VD, targets_N[span], with_top, tile, buffer))
    return Scores(*torch.cat(found, 1))


def _score_by_tiles(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    with_top: bool,
    tile: int,
    buffer: LogitsBuffer,
) -> Tensor:
    """[logprobs, logsumexps, tops], of positions whose tiles fit in the buffer."""
    of_targets = hidden_ND.new_zeros(len(hidden_ND), dtype=torch.float32)
    sums, tops = torch.zeros_like(of_targets), torch.zeros_like(of_targets)
    largest = torch.full_like(of_targets, -torch.inf)
    for first in range(0, len(weight_VD), tile):
        logits = buffer.fill(hidden_ND, weight_VD[first : first + tile])
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
