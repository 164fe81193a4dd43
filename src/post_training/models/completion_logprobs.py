"""log p(completion | prompt) of a causal language model, without ever holding its logits.

    logprob = Σ_t asked_t · log softmax(z_t)[c_t]        nats, a sum over the asked tokens

Each term is float32, whatever the dtype of the weights; the sum is float64, so that its order
doesn't show. Which states share what is said in shared_prompt.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from post_training.models.chunked_head import IGNORED, ChunkedHead
from post_training.models.shared_prompt import Prompt, SharedPromptForward

# 32 MiB: 1024 positions by a tile of the vocabulary. A GPU has room.
_CHUNK_NUMBERS = {"cpu": 2**23}


@dataclass(frozen=True)
class Asked(Prompt):
    """asked[i][t]: whether token t of completion i counts; left out, all of them do. Others, such
    as what a tool gave back, are only context."""

    asked: Sequence[Sequence[bool]] = field(default=())


@dataclass(frozen=True)
class CompletionLogprob:
    """logprob: nats, summed over num_tokens tokens."""

    logprob: float
    num_tokens: int


class LogprobScorer:
    """Errors: UsageError for a model whose logits are more than hidden · weightᵀ, or whose state
    can't be shared."""

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int, prompts_per_batch: int):
        self._head = ChunkedHead.install(model)
        self._layer = model.get_output_embeddings()
        self._forward = SharedPromptForward(
            model, max_batch_tokens=max_batch_tokens, prompts_per_batch=prompts_per_batch
        )

    @torch.no_grad()
    def score(self, prompts: Sequence[Asked]) -> list[list[CompletionLogprob]]:
        """Of each completion of each prompt."""
        found = [[CompletionLogprob(0.0, 0)] * len(prompt.completions) for prompt in prompts]
        for states in self._forward.states(prompts):
            targets = torch.full(states.hidden.shape[:2], IGNORED)
            for row, (number, index) in enumerate(states.rows):
                prompt = prompts[number]
                ids = torch.tensor(prompt.completions[index], dtype=torch.int64)
                if prompt.asked:
                    ids[~torch.tensor(prompt.asked[index], dtype=torch.bool)] = IGNORED
                targets[row, : len(ids)] = ids
            device = states.hidden.device
            numbers = _CHUNK_NUMBERS.get(device.type)
            with self._head.scoring(targets.to(device), chunk_numbers=numbers):
                logprobs, _, _ = self._layer(states.hidden)
            sums = logprobs.double().sum(1).tolist()
            counts = (targets != IGNORED).sum(1).tolist()
            for (number, index), total, count in zip(states.rows, sums, counts, strict=True):
                found[number][index] = CompletionLogprob(total, count)
        return found
