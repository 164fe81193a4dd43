"""The losses of supervised fine-tuning: one weight for each token, one sum.

t runs over the predicted tokens of a global batch (every rank, every accumulation step), P of them
prompt, C completion; a_t is a completion token's own weight in the data (1 unless set there) and w
the prompt_loss_weight. CE_t = −log p(x_t | x_<t). Everything is summed in float32 or better.

    sft      Σ_{P∪C} a_t CE_t / Σ a_t
    plw      (w Σ_P CE_t + Σ_C a_t CE_t) / (w |P| + Σ_C a_t)           arXiv 2401.13586
    ln-plw   w Σ_P CE_t / |P| + Σ_C a_t CE_t / Σ_C a_t
    irl      as ln-plw, with CE_t + λ (V_t + log p_t − γ V_{t+1})²     arXiv 2409.01369
             V_t = log Σ_v exp z_t[v], and 0 after the last token of its sequence

With sequence_level_loss the fractions are of each sequence alone, and the loss is the mean of the
sequences. An empty span contributes 0. A packed row is as many sequences as were packed into it.

So each loss is Σ c_t ℓ_t. The collator knows c_t up to two factors, one for prompts and one for
completions; these need the sums over the global batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from post_training.data.rows import COMPLETION, PROMPT
from post_training.stages.sft.config import LossConfig


@dataclass(frozen=True)
class Sums:
    """Of some sequences: |P|, Σ_C a_t, and their number. They add up over ranks and batches."""

    num_prompt: float = 0.0
    completion_weight: float = 0.0
    num_sequences: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, float, float]:
        return self.num_prompt, self.completion_weight, self.num_sequences


def sequence_weights(
    kinds_T: np.ndarray, weights_T: np.ndarray | None, loss: LossConfig
) -> tuple[np.ndarray, Sums]:
    """c_t of one sequence's predicted tokens but for the factors, float64 [T]; and its sums.

    kinds_T, weights_T: of the predicted tokens (the first of a sequence is not one).
    """
    prompt_T = (kinds_T == PROMPT).astype(np.float64)
    completion_T = (kinds_T == COMPLETION).astype(np.float64)
    if weights_T is not None:
        completion_T *= weights_T
    sums = Sums(float(prompt_T.sum()), float(completion_T.sum()), 1.0)
    of_prompt, of_completion = _shares(sums, loss) if loss.sequence_level_loss else (1.0, 1.0)
    return of_prompt * prompt_T + of_completion * completion_T, sums


def factors(sums: Sums, loss: LossConfig) -> tuple[float, float]:
    """(of prompt tokens, of completion tokens): what c_t of `sequence_weights` is multiplied by,
    given the sums over the global batch."""
    if loss.sequence_level_loss:
        return _fraction(1.0, sums.num_sequences), _fraction(1.0, sums.num_sequences)
    return _shares(sums, loss)


def _shares(sums: Sums, loss: LossConfig) -> tuple[float, float]:
    """What a prompt token and a completion token of weight 1 count in the loss over `sums`."""
    w = 1.0 if loss.name == "sft" else loss.prompt_loss_weight
    if loss.name in ("sft", "plw"):
        total = w * sums.num_prompt + sums.completion_weight
        return _fraction(w, total), _fraction(1.0, total)
    return _fraction(w, sums.num_prompt), _fraction(1.0, sums.completion_weight)


def _fraction(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def token_losses(
    logprobs_BT: Tensor, values_BT: Tensor, continues_BT: Tensor, loss: LossConfig
) -> Tensor:
    """ℓ_t, float32 [B, T], differentiable.

    logprobs_BT, values_BT: log p and V of each predicting position, float32. continues_BT: whether
    the next position predicts a token of the same sequence; V_{t+1} is 0 where not.
    """
    if loss.name != "irl":
        return -logprobs_BT
    next_BT = torch.zeros_like(values_BT)
    next_BT[:, :-1] = torch.where(continues_BT[:, :-1], values_BT[:, 1:], 0.0)
    difference = values_BT + logprobs_BT - loss.irl_gamma * next_BT
    return -logprobs_BT + loss.irl_lambda * difference**2


def span_losses(sums: dict[str, float]) -> dict[str, float]:
    """Mean cross-entropy of the prompts' and the completions' tokens, each where there are any,
    from {"prompt_loss": sum, "num_prompt_tokens": number, and the same for completions}."""
    return {
        f"{name}_loss": sums[f"{name}_loss"] / sums[f"num_{name}_tokens"]
        for name in ("prompt", "completion")
        if sums[f"num_{name}_tokens"]
    }
