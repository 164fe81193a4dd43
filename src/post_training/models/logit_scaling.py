"""What a family does to its states before the output layer, and to its logits after it.

    x = r · h                       before: MiniCPM 3; r = 1 elsewhere
    y = s · z                       after: Granite, Cohere, Falcon-H1
    y = c · tanh(s · z / c)         after: Gemma 2, 3n, 4

No setting tells it for all families, so it is found by trying: the model's own lines around that
layer are run on numbers that are known, and must be one of these on all of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from post_training.core.errors import UsageError

# Beyond every cap, and within float32, which some families turn their logits to.
_HUGE = 1e30
_RANGE = 100.0
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LogitScaling:
    """s, and c or None."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """y, in the place of z; of any shape."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def slopes(self, final: Tensor) -> Tensor | float:
        """dy/dz at y: s, or s · (1 − (y / c)²)."""
        if self.cap is None:
            return self.scale
        return (final / self.cap).square_().neg_().add_(1).mul_(self.scale)


def backbone_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """The model without its output layer; None where it has no such part."""
    if model.base_model is not model:
        return model.base_model
    inner = getattr(model, "model", None)  # Llama 4's text model names its part wrongly
    return inner if isinstance(inner, torch.nn.Module) else None


@torch.no_grad()
def find_logit_scaling(model: PreTrainedModel) -> LogitScaling:
    """Errors: UsageError where the logits are not y of any s and c."""
    layer = model.get_output_embeddings()
    num_ids = layer.out_features
    try:
        with _known_logits(model) as final_logits:
            unit, huge = (
                float(final_logits(torch.full((num_ids,), value, dtype=torch.float64)).flatten()[0])
                for value in (1.0, _HUGE)
            )
            scaling = LogitScaling(unit)
            if not math.isclose(huge, unit * _HUGE, rel_tol=_TOLERANCE):
                scaling = LogitScaling(huge * math.atanh(unit / huge), huge)
            plain = torch.linspace(-_RANGE, _RANGE, num_ids, dtype=torch.float64)
            found = final_logits(plain).flatten().double()
            expected = scaling.apply_(plain.clone())
        fits = found.shape == expected.shape and torch.allclose(
            found, expected, rtol=_TOLERANCE, atol=_TOLERANCE
        )
        problem = "they are no factor and no soft cap"
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        fits, problem = False, f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
    if not fits:
        raise UsageError(
            f"the loss does not know what models of the type {model.config.model_type} do to their "
            f"logits after the output layer: {problem}",
            where="model",
        )
    return _rounded(scaling)


@torch.no_grad()
def find_state_scale(model: PreTrainedModel) -> float:
    """r, for who gives states of the model without its output layer to that layer.

    Errors: UsageError where what the layer is given is not r · h of any r.
    """
    layer, backbone = model.get_output_embeddings(), backbone_of(model)
    # Numbers that every dtype has exactly: Mamba turns its states to that of the weights first.
    hidden = 1.0 + torch.arange(layer.in_features, device=model.device, dtype=torch.float64) % 4
    given = hidden

    def keep(states: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal given
        given = states.flatten()
        return states.new_zeros(1, 1, layer.out_features)

    with _stubbed({layer: keep, backbone: lambda *_, **__: _Outputs(hidden[None, None])}):
        _forward_one_token(model)
    scale = float(f"{float(given[0]):.9g}")
    if not torch.allclose(given.double(), scale * hidden, rtol=_TOLERANCE):
        raise UsageError(
            f"it is not known what models of the type {model.config.model_type} do to their states "
            "before the output layer, so completions can't be scored",
            where="model",
        )
    return scale


def _rounded(scaling: LogitScaling) -> LogitScaling:
    """Without the last bits of tanh and its inverse: a factor of 1 is then 1."""
    return LogitScaling(float(f"{scaling.scale:.9g}"), scaling.cap)


class _Outputs:
    """What the part without output layer would return: a state, and nothing else."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, key: Any) -> Any:
        return () if isinstance(key, slice) else self.last_hidden_state


@contextmanager
def _known_logits(model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from what the output layer would give, [V], to the model's logits. No weight is
    read, so they may be anywhere: with ZeRO-3 no rank has all of them."""
    layer, backbone = model.get_output_embeddings(), backbone_of(model)
    logits = torch.zeros(0)
    hidden = torch.zeros(1, 1, layer.in_features, device=model.device)

    def final_logits(plain: Tensor) -> Tensor:
        nonlocal logits
        logits = plain[None, None]
        return _forward_one_token(model).logits

    with _stubbed({layer: lambda *_, **__: logits, backbone: lambda *_, **__: _Outputs(hidden)}):
        yield final_logits


def _forward_one_token(model: PreTrainedModel) -> Any:
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    return model(input_ids=ids, use_cache=False, return_dict=True)


@contextmanager
def _stubbed(stubs: dict[torch.nn.Module | None, Callable[..., Any]]) -> Iterator[None]:
    """These functions in the place of the modules' own."""
    before = {module: module.__dict__.get("forward") for module in stubs if module is not None}
    for module in before:
        module.forward = stubs[module]
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
