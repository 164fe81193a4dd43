"""The hidden states of many completions, with each prompt computed once.

    prompt      p_0 … p_{P-1}     keys and values of p_0 … p_{P-2} are computed once and kept
    completion  c_0 … c_{C-1}     row: p_{P-1} c_0 … c_{C-1}, after a copy of what was kept

The state at position t of a row has seen the prompt and t tokens of its completion: it predicts
c_t, and the last one has seen everything. Completions of one prompt are batched by length and
padded at their end, where no real token looks.

With `prompts_per_batch` 1, a prompt's states depend on that prompt and its completions alone: not
one bit on the prompts beside it. With more, prompts of similar length are computed together, padded
at their beginning, and states may differ in their last bits with what is in the same list.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from post_training.core.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """ids: of the prompt, at least one. completions: ids of each."""

    ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class States:
    """hidden: [B, T, D]. rows[b]: (number of the prompt, number of its completion)."""

    hidden: Tensor
    rows: list[tuple[int, int]]


def keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether that is all a model keeps of a prompt: each row can then have a copy of it. A state,
    such as that of linear attention, can't be handed out so."""
    layers = DynamicCache(config=config).layers
    return all(isinstance(layer, DynamicLayer) for layer in layers)


class SharedPromptForward:
    """max_batch_tokens: of a batch, padding and prompts counted with each of its rows; a longer
    row is a batch of its own."""

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int, prompts_per_batch: int):
        self._backbone = model.base_model
        if self._backbone is model:
            raise UsageError(
                f"models of the type {model.config.model_type} can't be computed without their "
                "output layer, so completions can't be scored",
                where="model",
            )
        self._config = model.config
        self._device = model.device
        self._max_batch_tokens = max_batch_tokens
        self._prompts_per_batch = prompts_per_batch
        if not keeps_keys_and_values(model.config):
            raise UsageError(
                f"models of the type {model.config.model_type} keep a state that can't be shared "
                "between completions",
                where="model",
            )

    def states(self, prompts: Sequence[Prompt]) -> Iterator[States]:
        for group in self._groups(prompts):
            cache, kept = self._kept([prompts[number].ids for number in group])
            for rows in self._batches(prompts, group):
                yield self._forward(prompts, group, rows, cache, kept)

    def _groups(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Numbers of the prompts that are computed together."""
        group: list[int] = []
        for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids)):
            # Of a prompt of one token nothing is kept, and a row that is all padding is undefined.
            alone = group and len(prompts[group[0]].ids) == 1
            if group and (alone or len(group) == self._prompts_per_batch):
                yield group
                group = []
            group.append(number)
        if group:
            yield group

    def _batches(self, prompts: Sequence[Prompt], group: list[int]) -> Iterator[list]:
        """(prompt, completion) of each row, the longest first."""
        rows = [(number, index) for number in group
                for index in range(len(prompts[number].completions))]  # fmt: skip
        rows.sort(key=lambda row: -len(prompts[row[0]].completions[row[1]]))
        prompt_length = max(len(prompts[number].ids) for number in group)
        start = 0
        while start < len(rows):
            number, index = rows[start]
            length = prompt_length + len(prompts[number].completions[index])
            size = max(1, self._max_batch_tokens // length)
            yield rows[start : start + size]
            start += size

    @torch.no_grad()
    def _kept(self, prompts: list[Sequence[int]]) -> tuple[DynamicCache, Tensor | None]:
        """Of all but the last token of each prompt: the cache, and its mask, int64 [K, P-1]; None
        where nothing is padded."""
        cache = DynamicCache(config=self._config)
        length = max(map(len, prompts)) - 1
        if length == 0:
            return cache, None
        ids = torch.zeros(len(prompts), length, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
            mask[row, length - len(prompt) + 1 :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        padded = None if bool(mask.all()) else mask
        self._backbone(
            input_ids=ids,
            attention_mask=padded,
            position_ids=None if padded is None else (mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
        )
        return cache, padded

    @torch.no_grad()
    def _forward(
        self,
        prompts: Sequence[Prompt],
        group: list[int],
        rows: list[tuple[int, int]],
        cache: DynamicCache,
        kept: Tensor | None,
    ) -> States:
        lengths = [len(prompts[number].completions[index]) + 1 for number, index in rows]
        ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
        for row, (number, index) in enumerate(rows):
            last, completion = prompts[number].ids[-1], prompts[number].completions[index]
            ids[row, : lengths[row]] = torch.tensor([last, *completion])
        ids = ids.to(self._device)
        owners = torch.tensor([group.index(number) for number, _ in rows], device=self._device)
        own = copy.deepcopy(cache)
        for layer in own.layers:
            layer.batch_select_indices(owners)
        mask = positions = None
        if kept is not None:
            mask = torch.cat([kept[owners], torch.ones_like(ids)], 1)
            starts = torch.tensor(
                [len(prompts[number].ids) - 1 for number, _ in rows], device=self._device
            )
            positions = starts[:, None] + torch.arange(ids.shape[1], device=self._device)
        hidden = self._backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=own,
            use_cache=True,
        ).last_hidden_state
        return States(hidden, rows)
