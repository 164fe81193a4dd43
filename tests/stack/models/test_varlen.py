"""Attention of each packed sequence by itself, against the softmax written out in float64."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.sft_runs import changed, metrics, sft
from post_training.core.errors import PostTrainingError
from post_training.models import varlen
from post_training.models.attention import KEEP_PACKED_APART, check_left_out, seen_across
from post_training.models.varlen import attend, register_varlen, sequence_bounds

HEADS, KEY_HEADS, SIZE = 4, 2, 8
NOT_USED = nn.Identity()


def naive(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scaling: float, window: int | None
) -> Tensor:
    """[B, H, T, D]…, [B, T] -> [B, T, H, D] in float64, a token at a time."""
    mixed = torch.zeros(query.transpose(1, 2).shape, dtype=torch.float64)
    num_rows, num_heads, length, _ = query.shape
    for row in range(num_rows):
        begin = 0
        for token in range(length):
            if token and positions[row, token] != positions[row, token - 1] + 1:
                begin = token
            first = begin if window is None else max(begin, token - window + 1)
            for head in range(num_heads):
                shared = head * key.shape[1] // num_heads
                keys = key[row, shared, first : token + 1].double()
                scores = scaling * (keys @ query[row, head, token].double())
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                mixed[row, token, head] = weights @ value[row, shared, first : token + 1].double()
    return mixed


def positions_of(rows: list[list[int]]) -> Tensor:
    """Rows of equal sums, each the lengths of its sequences, as position ids."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def random_heads(num_rows: int, length: int, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num_rows, heads, length, SIZE, generator=draw, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


@given(
    rows=st.lists(st.permutations([1, 2, 5, 8]), min_size=1, max_size=3),
    window=st.sampled_from([None, 1, 3, 100]),
    scaling=st.sampled_from([None, 0.1, 1.0]),
)
@settings(max_examples=25, deadline=None)
def test_attend_equals_the_softmax_written_out(rows, window, scaling):
    positions = positions_of(rows)
    heads = random_heads(*positions.shape)
    found, weights = attend(
        NOT_USED, *heads, None, scaling=scaling, sliding_window=window, position_ids=positions
    )
    expected = naive(*heads, positions, scaling or 1 / math.sqrt(SIZE), window)
    assert weights is None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_attend_has_the_gradients_of_the_softmax_written_out():
    positions = positions_of([[3, 4], [7]])
    heads, same = random_heads(2, 7), random_heads(2, 7)
    upstream = torch.randn(2, 7, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    attend(NOT_USED, *heads, None, position_ids=positions)[0].backward(upstream)
    naive(*same, positions, 1 / math.sqrt(SIZE), None).backward(upstream.double())
    for found, expected in zip(heads, same, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_gqa", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_attend_on_a_gpu_asks_the_kernel_for_the_same(
    has_gqa: bool, monkeypatch: pytest.MonkeyPatch
):
    """PyTorch's kernel is of GPUs only; here its place is taken by what its documentation says."""
    monkeypatch.setattr(varlen, "_HAS_GQA", has_gqa)
    monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    positions = positions_of([[3, 1, 4], [8]])
    for window in (None, 2):
        heads = [each.detach().to(torch.bfloat16) for each in random_heads(2, 8)]
        flat = [each.transpose(1, 2).flatten(0, 1) for each in heads]
        found = varlen._on_gpu(*flat, sequence_bounds(positions), 0.3, window)
        expected = naive(*heads, positions, 0.3, window).flatten(0, 1)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


# Runs by `tests/inside-image` on a machine with a GPU; elsewhere its kernel cannot.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attend_on_a_gpu_equals_the_softmax_written_out():
    positions = positions_of([[3, 1, 4], [8]])
    for window in (None, 2):
        heads = [each.detach().to(torch.bfloat16) for each in random_heads(2, 8)]
        found, _ = attend(
            NOT_USED,
            *(each.cuda() for each in heads),
            None,
            sliding_window=window,
            position_ids=positions.cuda(),
        )
        expected = naive(*heads, positions, 1 / math.sqrt(SIZE), window)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-2, atol=1e-2)


def as_documented(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn by its documentation: [T, heads, D] -> [T, H, D]."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1])
    before, after = window_size
    mixed = torch.zeros_like(query)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        for token in range(start, end):
            first = start if before < 0 else max(start, token - before)
            last = end if after < 0 else min(end, token + after + 1)
            for head in range(query.shape[1]):
                shared = head * key.shape[1] // query.shape[1]
                scores = scale * (key[first:last, shared].double() @ query[token, head].double())
                mixed[token, head] = scores.softmax(0) @ value[first:last, shared].double()
    return mixed


def test_sequence_bounds_are_where_positions_start_again_and_where_rows_do():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [5, 6, 0, 0, 1]])
    assert sequence_bounds(positions).tolist() == [0, 3, 5, 10, 12, 13, 15]


def tiny(model_type: str) -> PreTrainedModel:
    """In eager. Without what varlen refuses; with a window where the family has one."""
    settings: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 64, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if model_type in ("gemma2", "mistral", "phi3"):
        settings["sliding_window"] = 3
    if model_type == "gemma2":
        settings["attn_logit_softcapping"] = None
    register_varlen()
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("model_type", KEEP_PACKED_APART)
def test_models_compute_the_same_as_in_eager(model_type: str):
    model = tiny(model_type).train()
    ids = torch.arange(2 * 9).reshape(2, 9) % 64
    positions = positions_of([[4, 5], [6, 3]])
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, 6:] = 0

    def logits(**arguments: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, **arguments).logits

    packed, padded = logits(position_ids=positions), logits(attention_mask=padding)
    model.set_attn_implementation("varlen")
    check_left_out(model, "varlen")
    torch.testing.assert_close(logits(position_ids=positions), packed, rtol=1e-4, atol=1e-5)
    kept = padding.bool()
    found = logits(attention_mask=padding)[kept]
    torch.testing.assert_close(found, padded[kept], rtol=1e-4, atol=1e-5)
    assert seen_across(model) == 0


def test_what_it_would_compute_wrongly_is_refused():
    model = tiny("llama")
    model.set_attn_implementation("varlen")
    ids = torch.arange(6)[None] + 3
    before = torch.tensor([[0, 1, 1, 1, 1, 1]])
    with pytest.raises(PostTrainingError, match="padding after a text only"):
        model(input_ids=ids, attention_mask=before, use_cache=False)
    with pytest.raises(PostTrainingError, match="not for generation with a cache"):
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with pytest.raises(PostTrainingError, match="varlen attention has no s_aux"):
        positions = torch.arange(6)[None]
        attend(NOT_USED, *random_heads(1, 6), None, position_ids=positions, s_aux=torch.zeros(4))
    capped = AutoConfig.for_model("gemma2")
    model.config.attn_logit_softcapping = capped.attn_logit_softcapping
    with pytest.raises(PostTrainingError, match="no attn_logit_softcapping, and the model's is 50"):
        check_left_out(model, "varlen")


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_training_takes_the_steps_of_sdpa(
    config: dict[str, Any], model: Path, tmp_path: Path, packing: str
):
    """Several packed rows in a micro-batch, which flash_attention_2 can't tell apart."""
    losses = []
    for implementation in ("sdpa", "varlen"):
        of_run = changed(
            config,
            **{
                "model.path": str(model),
                "model.attn_implementation": implementation,
                "sft.packing": packing,
                "training.per_device_train_batch_size": 2,
            },
        )
        sft(of_run, tmp_path / implementation)
        losses.append([line["loss"] for line in metrics(tmp_path / implementation)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
