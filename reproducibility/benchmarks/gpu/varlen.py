"""PyTorch's attention over sequences of different lengths, for packed rows, as transformers' Llama
takes it: no mask, but the bounds of the sequences. Source: torch.nn.attention.varlen.

This is a measurement, no setting of ours yet: with sdpa, packed rows have a mask of [T, T], for
which PyTorch has no flash kernel.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

VARLEN = "measured_varlen"


def register_varlen(device: str) -> str | None:
    """Let transformers know it. Why it can't be had here, in a line; None where it can."""
    if device != "cuda":
        return "varlen_attn runs on GPUs only"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        return f"torch {torch.__version__} has none: {error}"
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    # 2.10 had is_causal; a window without tokens to the right came in its place.
    has_window = "window_size" in inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if has_window else {"is_causal": True}
    last: list[Any] = [None, None]

    def find_bounds(position_ids: Tensor) -> tuple[Tensor, int]:
        """Once a forward pass, whose layers all get one tensor: it makes the GPU wait."""
        if last[0] is not position_ids:
            starts = (position_ids[0] == 0).nonzero().squeeze(1).int()
            bounds = torch.nn.functional.pad(starts, (0, 1), value=position_ids.shape[1])
            last[:] = position_ids, (bounds, int((bounds[1:] - bounds[:-1]).max()))
        return last[1]

    def attend(
        module: Any,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        attention_mask: None,
        scaling: float | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        assert query_BHTD.shape[0] == 1, "a micro-batch is one row"
        bounds, longest = find_bounds(position_ids)
        # Fewer heads of keys than of queries: repeated, as sdpa does without its own support.
        groups = query_BHTD.shape[1] // key_BHTD.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key_BHTD, value_BHTD))
        query, key, value = (each[0].transpose(0, 1) for each in (query_BHTD, key, value))
        found = varlen_attn(query, key, value, bounds, bounds, longest, longest, **causal)
        return found[None], None

    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, lambda *args, **kwargs: None)
    return None
