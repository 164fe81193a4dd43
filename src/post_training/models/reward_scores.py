"""Rewards of whole conversations by a sequence-classification model.

    reward = score · h_last        float32; h_last: the state of the conversation's last token

As transformers has it, padding is no part of a conversation: the last token is the last that is not
the model's pad token. What conversations have in common at their beginning is computed once.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from transformers import PreTrainedModel

from post_training.models.shared_prompt import Prompt, SharedPromptForward


class RewardScorer:
    """model: of load_reward_model. Errors: UsageError for a model whose state can't be shared."""

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int, prompts_per_batch: int):
        self._score = model.score
        self._pad_id = model.config.get_text_config().pad_token_id
        self._forward = SharedPromptForward(
            model, max_batch_tokens=max_batch_tokens, prompts_per_batch=prompts_per_batch
        )

    @torch.no_grad()
    def score(self, groups: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """groups: conversations that begin alike, as token ids; the reward of each."""
        prompts = [self._prompt(conversations) for conversations in groups]
        rewards = [[0.0] * len(prompt.completions) for prompt in prompts]
        for states in self._forward.states(prompts):
            last = [len(prompts[number].completions[index]) for number, index in states.rows]
            hidden = states.hidden[range(len(last)), last]
            for (number, index), reward in zip(
                states.rows, self._score(hidden).float().squeeze(1).tolist(), strict=True
            ):
                rewards[number][index] = reward
        return rewards

    def _prompt(self, conversations: Sequence[Sequence[int]]) -> Prompt:
        kept = [self._without_padding(ids) for ids in conversations]
        shortest = min(map(len, kept))
        alike = takewhile(lambda position: len({ids[position] for ids in kept}) == 1,
                          range(shortest))  # fmt: skip
        common = max(1, min(sum(1 for _ in alike), shortest - 1))
        return Prompt(kept[0][:common], [ids[common:] for ids in kept])

    def _without_padding(self, ids: Sequence[int]) -> Sequence[int]:
        end = len(ids)
        while end > 1 and ids[end - 1] == self._pad_id:
            end -= 1
        return ids[:end]
