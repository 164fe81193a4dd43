"""Context parallelism: several processes share a row, each with some of its tokens.

Every layer but attention works on one token at a time, so a process needs its own tokens alone. In
attention the processes exchange: before it each has all heads of its tokens, in it some heads of
all tokens, after it all heads of its tokens again (Ulysses, https://arxiv.org/abs/2309.14509).
Between the two exchanges it is attention as varlen.py computes it, to the bit: no sum over tokens
is divided, as it would be with a ring.

Why not accelerate's own: its ring needs FSDP2 and takes no packed rows; its Ulysses is DeepSpeed's,
and takes packed rows with the package flash-attn only.

Legend of shapes: as in varlen.py; T tokens of the row, of which t = T / size are here.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from post_training.core.errors import PostTrainingError
from post_training.models.attention import KNOWN_LAYERS, check_packing
from post_training.models.router_loss import RouterLoss
from post_training.models.varlen import attend, no_mask

_NAME = "varlen_of_parts"
_KEY = "distributed.context_parallel_size"
# Settings of layers that are no kind of their own in layer_types.
_MIXERS = ("conv_kernel", "conv_L_cache", "mamba_d_conv", "linear_conv_kernel_dim")


@dataclass(frozen=True)
class RowPart:
    """The part of each row that this process has: `index` of `size`, from the left. group: the
    torch.distributed group of the processes that share a row, in the order of their parts."""

    size: int
    index: int
    group: Any

    def span(self, num_tokens: int) -> slice:
        """Which tokens of a row of `num_tokens`, a multiple of `size`."""
        length = num_tokens // self.size
        return slice(self.index * length, (self.index + 1) * length)


def share_rows(model: PreTrainedModel, part: RowPart) -> None:
    """Let the model's attention see the whole row, of which it is given a part.

    model: loaded with varlen. Errors: PostTrainingError for one that can't be computed so.
    """
    _check(model, part.size)
    AttentionInterface.register(_NAME, partial(_attend_with_others, part=part))
    AttentionMaskInterface.register(_NAME, no_mask)
    model.set_attn_implementation(_NAME)


def _check(model: PreTrainedModel, size: int) -> None:
    settings = model.config.get_text_config()
    num_heads = settings.num_attention_heads
    num_groups = getattr(settings, "num_key_value_heads", None) or num_heads
    others = sorted({*(getattr(settings, "layer_types", None) or ())} - KNOWN_LAYERS)
    mixers = [name for name in _MIXERS if getattr(settings, name, None)]
    problem = None
    if num_heads % size:
        problem = f"must divide the model's {num_heads} attention heads (got {size})"
    elif num_groups % size and size % num_groups:
        problem = f"must divide the model's {num_groups} key-value heads, or be a multiple of them "
        problem += f"(got {size})"
    elif others or mixers:
        kind = (others or mixers)[0]
        problem = f"models of the type {settings.model_type} have layers that mix tokens outside "
        problem += f"of attention ({kind})"
    elif RouterLoss.for_model(model) is not None:
        problem = "the router's auxiliary loss is of whole rows; set router_aux_loss_coef: 0 in "
        problem += "the model's config.json to train without it"
    if problem is not None:
        raise PostTrainingError(problem, where=_KEY)
    check_packing(model)  # its position ids must be read


def _attend_with_others(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    part: RowPart,
    position_ids: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """varlen.attend over the whole row; transformers' signature.

    query: [B, H, t, D]; key, value: [B, K, t, D]. position_ids: [B, t] or [1, t].
    Returns: [B, t, H, D], and None in place of the weights.
    """
    if position_ids is not None:
        position_ids = _gather(position_ids.expand(len(query), -1), part)
    num_groups = key.shape[1]
    if num_groups < part.size:  # several processes have the same one
        key, value = (each.repeat_interleave(part.size // num_groups, 1) for each in (key, value))
    whole = [_Exchange.apply(each, part) for each in (query, key, value)]
    mixed, _ = attend(module, *whole, attention_mask, position_ids=position_ids, **settings)
    return _Exchange.apply(mixed, part), None


def _gather(own: Int64[Tensor, "B t"], part: RowPart) -> Int64[Tensor, "B T"]:
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(part.size)]
    dist.all_gather(parts, own.contiguous(), group=part.group)
    return torch.cat(parts, 1)


class _Exchange(torch.autograd.Function):
    """Every process gets its share of dimension 1, with what all have of dimension 2.

    Heads for tokens: [B, H, t, D] → [B, H/size, T, D]. Back: [B, T, H/size, D] → [B, t, H, D].
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, part: RowPart) -> Tensor:
        ctx.part = part
        return _exchange(own, 1, 2, part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradient, 2, 1, ctx.part), None


def _exchange(own: Tensor, split: int, join: int, part: RowPart) -> Tensor:
    shares = torch.stack(own.chunk(part.size, split))
    found = torch.empty_like(shares)
    dist.all_to_all_single(found, shares, group=part.group)
    return torch.cat(found.unbind(), join)
