"""`attn_implementation: varlen`: attention of each packed sequence by itself.

A packed row holds several sequences, whose positions start again. sdpa and eager compute the scores
of all pairs of a row and mask those across sequences: T² of them for a row of T tokens. Here each
sequence is computed alone: Σ Tᵢ² scores, and no mask.

On GPUs PyTorch's own torch.nn.attention.varlen does it, which has FlashAttention's kernels inside;
it needs 16 bits and no package. On CPUs sdpa is called for one sequence after the other.

Legend of shapes: B rows, T tokens a row, H heads of queries, K heads of keys and values (H is a
multiple of K), D their size; N sequences of the batch.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from post_training.core.errors import PostTrainingError

VARLEN = "varlen"
_KEY = "model.attn_implementation"
# Arguments that some models hand over, which have no counterpart here: sinks, caps, biases.
_CHANGES_THE_RESULT = ("s_aux", "softcap", "position_bias")
# Whether several heads of queries can share one of keys: not in PyTorch 2.11.
_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters
# The dtypes of FlashAttention's kernels.
_HALF = (torch.float16, torch.bfloat16)


def register_varlen() -> None:
    """Tell transformers of it. Again is harmless."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, no_mask)


def check_varlen(model: PreTrainedModel) -> None:
    """Errors: PostTrainingError for a model whose attention has more than it computes."""
    settings = model.config.get_text_config()
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if limit := getattr(settings, name, None):
            raise PostTrainingError(
                f"{VARLEN} has no {name}, and the model's is {limit}",
                where=_KEY,
                hint="take eager",
            )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · QKᵀ) V of each sequence, causal; transformers' signature.

    query: [B, H, T, D]; key, value: [B, K, T, D]. scaling: D^-½ where it is None.
    attention_mask: None (see `no_mask`). dropout: 0 (`check_left_out` sees to it).
    sliding_window: a token sees itself and this many minus one before it.
    position_ids: [B, T], or [1, T] for all rows. A sequence begins where a row does, and wherever a
        position is not the one before it plus one.
    Returns: [B, T, H, D] in the dtype of `query`, and None in place of the weights.
    Errors: PostTrainingError for a call that it would compute wrongly.
    """
    num_rows, num_heads, length, _ = query.shape
    unknown = [name for name in _CHANGES_THE_RESULT if settings.get(name) is not None]
    if attention_mask is not None or dropout or unknown:
        what = unknown[0] if unknown else "dropout" if dropout else "a mask"
        raise PostTrainingError(f"{VARLEN} attention has no {what}", where=_KEY, hint="take sdpa")
    if position_ids is None or key.shape[2] != length:
        raise PostTrainingError(
            f"{VARLEN} attention needs the positions of all tokens: it is for training, not for "
            "generation with a cache",
            where=_KEY,
            hint="take sdpa",
        )
    bounds = sequence_bounds(position_ids.expand(num_rows, length))
    flat = [each.transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    if query.is_cuda:
        mixed = _on_gpu(*flat, bounds, scaling, sliding_window)
    else:
        mixed = _one_by_one(*flat, bounds, scaling, sliding_window)
    return mixed.reshape(num_rows, length, num_heads, -1), None


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> None:
    """None for every mask that changes nothing: tokens after a text are seen by none of its own.

    attention_mask: [B, T], true at tokens that are no padding. transformers' signature.
    Errors: PostTrainingError for padding before a text.
    """
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise PostTrainingError(
            f"{VARLEN} attention takes padding after a text only, and this batch has some before",
            where=_KEY,
            hint="take sdpa",
        )


def sequence_bounds(position_ids: Int64[Tensor, "B T"]) -> Int32[Tensor, " bounds"]:
    """Where each sequence of the flattened rows begins, and the end."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    return functional.pad(starts, (0, 1), value=begins.numel()).to(torch.int32)


def _on_gpu(
    query: Float[Tensor, "P heads D"],
    key: Float[Tensor, "P groups D"],
    value: Float[Tensor, "P groups D"],
    bounds: Int32[Tensor, " bounds"],
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "P heads D"]:
    """Of float32 (LoRA keeps some so) bfloat16 is made."""
    dtype = query.dtype
    if dtype not in _HALF:
        query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    longest = int(bounds.diff().max())
    shared = query.shape[1] // key.shape[1]
    if _HAS_GQA:
        settings = {"enable_gqa": shared != 1}
    else:
        settings = {}
        key, value = (each.repeat_interleave(shared, 1) for each in (key, value))
    mixed = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        # (tokens before, tokens after); -1 is all of them.
        window_size=(-1 if window is None else window - 1, 0),
        **settings,
    )
    return mixed.to(dtype)


def _one_by_one(
    query: Float[Tensor, "P heads D"],
    key: Float[Tensor, "P groups D"],
    value: Float[Tensor, "P groups D"],
    bounds: Int32[Tensor, " bounds"],
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "P heads D"]:
    mixed = []
    for start, end in pairwise(bounds.tolist()):
        parts = (each[start:end].transpose(0, 1)[None] for each in (query, key, value))
        mask = None
        if window is not None and window < end - start:
            ones = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - window)
        one = functional.scaled_dot_product_attention(
            *parts,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        mixed.append(one[0].transpose(0, 1))
    return torch.cat(mixed)
