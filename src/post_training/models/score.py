"""Log-probabilities of completions, and rewards of conversations: each prompt is computed once.

    prompt      p_0 … p_{P-1}     keys and values of p_0 … p_{P-2} are computed once and kept
    completion  c_0 … c_{C-1}     row: p_{P-1} c_0 … c_{C-1}, after a copy of what was kept

The state at position t of a row has seen the prompt and t tokens of its completion: it predicts
c_t, and the last one has seen everything. Completions of one prompt are batched by length and
padded at their end, where no real token looks.

A model that keeps a state (linear attention, Mamba) can't hand it out so: there a row is the whole
of prompt and completion, and the rows of a batch are of one prompt.

With `prompts_per_batch` 1, a prompt's states depend on that prompt and its completions alone: not
one bit on the prompts beside it. With more, prompts of similar length are computed together, padded
at their beginning, and states may differ in their last bits with what is in the same list.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from post_training.core.errors import UsageError
from post_training.models.head import IGNORED, ChunkedHead
from post_training.models.logit_scaling import backbone_of, find_state_scale

# 32 MiB of logits: 4096 positions by a tile of the vocabulary. A GPU has room.
_CHUNK_NUMBERS = {"cpu": 2**23}


@dataclass(frozen=True)
class Prompt:
    """ids: of the prompt, at least one. completions: ids of each."""

    ids: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class States:
    """rows[b]: (number of the prompt, number of its completion)."""

    hidden: Float[Tensor, "B T D"]
    rows: list[tuple[int, int]]


def keeps_keys_and_values(config: PreTrainedConfig) -> bool:
    """Whether that is all a model keeps of a prompt: each row can then have a copy of it. A state,
    such as that of linear attention, can't be handed out so."""
    layers = DynamicCache(config=config).layers
    # A layer with both kinds is a DynamicLayer too, and would hand out the keys alone (Falcon-H1).
    return all(
        isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)
        for layer in layers
    )


class SharedPromptForward:
    """The hidden states of many completions.

    max_batch_tokens: of a batch, padding and prompts counted with each of its rows; a longer row is
    a batch of its own.
    prompts_per_batch: how many prompts are computed together; 1: bits depend on nothing else.
    """

    def __init__(self, model: PreTrainedModel, *, max_batch_tokens: int, prompts_per_batch: int):
        backbone = backbone_of(model)
        if backbone is None:
            raise UsageError(
                f"models of the type {model.config.model_type} can't be computed without their "
                "output layer, so completions can't be scored",
                where="model",
            )
        self._backbone = backbone
        self._config = model.config
        self._shares_prompts = keeps_keys_and_values(model.config)
        self._device = model.device
        self._max_batch_tokens = max_batch_tokens
        self._prompts_per_batch = prompts_per_batch if self._shares_prompts else 1

    def states(self, prompts: Sequence[Prompt]) -> Iterator[States]:
        for group in self._groups(prompts):
            if not self._shares_prompts:
                for rows in self._batches(prompts, group):
                    yield self._forward_whole(prompts[group[0]], rows)
                continue
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
        rows = [
            (number, index) for number in group for index in range(len(prompts[number].completions))
        ]
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
    def _kept(
        self, prompts: list[Sequence[int]]
    ) -> tuple[DynamicCache, Int64[Tensor, "prompts kept"] | None]:
        """Of all but the last token of each prompt: the cache, and its mask; None where nothing is
        padded."""
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
    def _forward_whole(self, prompt: Prompt, rows: list[tuple[int, int]]) -> States:
        """Each row from its beginning; padding is at the end, where no token sees it."""
        texts = [[*prompt.ids, *prompt.completions[index]] for _, index in rows]
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
        output = self._backbone(input_ids=ids.to(self._device), use_cache=False)
        return States(output.last_hidden_state[:, len(prompt.ids) - 1 :], rows)

    @torch.no_grad()
    def _forward(
        self,
        prompts: Sequence[Prompt],
        group: list[int],
        rows: list[tuple[int, int]],
        cache: DynamicCache,
        kept: Int64[Tensor, "prompts kept"] | None,
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
    """log p(completion | prompt) of a causal language model, without ever holding its logits.

        logprob = Σ_t asked_t · log softmax(z_t)[c_t]        nats, a sum over the asked tokens

    Each term is float32, whatever the dtype of the weights; the sum is float64, so that its order
    doesn't show.

    Errors: UsageError for a model whose logits or parts are not those the head knows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_batch_tokens: int,
        prompts_per_batch: int,
        float32_logits: bool = False,
    ):
        self._head = ChunkedHead.install(model, float32_logits=float32_logits)
        self._layer = model.get_output_embeddings()
        self._forward = SharedPromptForward(
            model, max_batch_tokens=max_batch_tokens, prompts_per_batch=prompts_per_batch
        )
        self._state_scale = find_state_scale(model)

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
            hidden = states.hidden if self._state_scale == 1 else states.hidden * self._state_scale
            with self._head.scoring(targets.to(device), chunk_numbers=numbers):
                logprobs, _, _ = self._layer(hidden)
            sums = logprobs.double().sum(1).tolist()
            counts = (targets != IGNORED).sum(1).tolist()
            for (number, index), total, count in zip(states.rows, sums, counts, strict=True):
                found[number][index] = CompletionLogprob(total, count)
        return found


class RewardScorer:
    """Rewards of whole conversations by a sequence-classification model.

        reward = score · h_last        float32; h_last: the state of the conversation's last token

    As transformers has it, padding is no part of a conversation: the last token is the last that is
    not the model's pad token. What conversations have in common at their beginning is computed
    once.

    model: of load_reward_model.
    """

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
        alike = takewhile(
            lambda position: len({ids[position] for ids in kept}) == 1, range(shortest)
        )
        common = max(1, min(sum(1 for _ in alike), shortest - 1))
        return Prompt(kept[0][:common], [ids[common:] for ids in kept])

    def _without_padding(self, ids: Sequence[int]) -> Sequence[int]:
        end = len(ids)
        while end > 1 and ids[end - 1] == self._pad_id:
            end -= 1
        return ids[:end]
