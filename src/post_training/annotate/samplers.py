"""Drawing samples from a model: with plain transformers, or with vLLM.

A prompt's samples depend on the prompt and its seed alone, so that every chunk and worker draws the
same. What ends a sample (Endings) and the seeds (prompt_seed) are the same for both.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig

from post_training.annotate.config import GenerateConfig, SamplingConfig
from post_training.annotate.engine import VllmEngine, load_own_tokenizer
from post_training.data.tokenize import Encoder
from post_training.models.attention import most_positions
from post_training.models.device import move_to_device
from post_training.models.left_out import describe_left_out
from post_training.models.load import check_vocabulary, load_model, read_model_settings
from post_training.models.score import keeps_keys_and_values
from post_training.stages.context import StageContext

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams

# Below 2^62, so that seed + j fits into the signed 64 bits of every generator.
_SEED_BITS = 62


@dataclass(frozen=True)
class Prompt:
    """ids: of its tokens. seed: of its first sample; sample j has seed + j."""

    ids: list[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """A sample. text: without the end of the turn and without special tokens, not stripped.

    token_ids: all that were drawn, the one that ended it too. logprobs: of each, in nats, float32:
    log softmax of the model's logits as they are, without temperature and top_p.
    finish_reason: it ended its turn, or reached a stop text; or it was cut off.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Sampler(ABC):
    """A model that is drawn from."""

    @abstractmethod
    def sample(self, prompts: list[Prompt]) -> list[list[Completion]]:
        """The n samples of each prompt, which depend on the prompt alone."""

    @abstractmethod
    def max_length(self) -> int | None:
        """Of a prompt with a sample, in tokens; None where the model sets no limit."""

    def restart(self) -> None:  # noqa: B027 - a plain model has no engine that could die
        """After an exception. Errors: PostTrainingError when it can't be had back."""


def prompt_seed(seed: int, conversation_id: str, n: int) -> int:
    """The seed of the first of a prompt's n samples; sample j has it + j. A multiple of a power of
    two ≥ n.

    It is made from the recipe's seed and the prompt's id, so it depends neither on the chunk nor on
    the worker; the run's id is no part of it, since a reproduction has another. Seeds of different
    prompts are further apart than n, so no two samples of a run have one seed, but with the chance
    that two of its prompts have the same 62 bits. (With one seed for all prompts of a batch, as in
    vllm#50884, they would be correlated.)
    """
    digest = hashlib.sha256(f"{seed} {conversation_id}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)
    stride_bits = (n - 1).bit_length()
    return number >> stride_bits << stride_bits


def random_numbers(seed: int) -> np.random.Generator:
    """The generator of one sample: a stream of its own for each seed, whatever bits they differ in.

    torch's generators on CPUs keep 32 bits of a seed: among 20,000 prompts it is then as likely as
    not that two draw the same numbers. numpy's Philox takes all of it.
    """
    return np.random.Generator(np.random.Philox(key=seed))


@dataclass(frozen=True)
class Endings:
    """What ends a sample, and what of it is text.

    ids: tokens that end a sample. texts: stop texts, which end it as soon as they are in it.
    """

    ids: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: Tokenizer

    @classmethod
    def read(cls, model: Path, encoder: Encoder, texts: list[str]) -> "Endings":
        """The ids are those that the model's folder names, the tokenizer's eos, and the template's
        end of a turn, where it is one token."""
        if (model / "generation_config.json").exists():
            named = GenerationConfig.from_pretrained(model, local_files_only=True).eos_token_id
        else:
            named = read_model_settings(model).get("eos_token_id")
        ids = {named} if isinstance(named, int) else set(named or ())
        if encoder.eos_id is not None:
            ids.add(encoder.eos_id)
        mark = encoder.backend.encode(encoder.template.end_of_turn, add_special_tokens=False).ids
        if len(mark) == 1:
            ids.add(mark[0])
        return cls(frozenset(ids), tuple(texts), encoder.backend)

    def text(self, ids: list[int]) -> str:
        """The text of a sample's tokens, without the end of the turn, special tokens and the stop
        text."""
        if ids[-1] in self.ids:
            ids = ids[:-1]
        cut = self.cut(ids)
        return self._decode(ids) if cut is None else cut

    def cut(self, ids: list[int]) -> str | None:
        """The text before the first stop text; None when there is none in it."""
        text = self._decode(ids)
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class TransformersSampler(Sampler):
    """Sampling with plain transformers.

    A batch is the n samples of one prompt, from its first step to its last: samples that have ended
    stay in it. So no matrix product ever has a shape, and no sample a neighbour, that depends on
    which prompts a worker has beside it, and the bits of a sample are the same in every chunk.
    The prompt is read once, and its cache shared out, where that is one of keys and values.

    Each sample has its own generator; a number of it picks the token by the running total of the
    probabilities in float64, on the CPU.
    """

    def __init__(self, config: GenerateConfig, encoder: Encoder, context: StageContext):
        self.settings = config.sampling
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        model = load_model(
            config.model.path,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
        )
        if (left_out := describe_left_out(model, config.model.path)) is not None:
            context.log(f"warning: {left_out}")
        check_vocabulary(model, load_own_tokenizer(config.model.path, config.data))
        self.model = move_to_device(model, context.ranks.local_rank)
        # Where the cache is another, the prompt is read n times.
        self._shares_prompts = keeps_keys_and_values(model.config)
        self.endings = Endings.read(config.model.path, encoder, self.settings.stop)

    def max_length(self) -> int | None:
        return most_positions(self.model.config)

    def sample(self, prompts: list[Prompt]) -> list[list[Completion]]:
        return [self._sample(prompt) for prompt in prompts]

    @torch.inference_mode()
    def _sample(self, prompt: Prompt) -> list[Completion]:
        n = self.settings.n
        generators = [random_numbers(prompt.seed + j) for j in range(n)]
        drawn: list[list[int]] = [[] for _ in range(n)]
        logprobs: list[list[float]] = [[] for _ in range(n)]
        is_open = [True] * n
        ids = torch.tensor([prompt.ids], device=self.model.device)
        if self._shares_prompts:
            output = self.model(input_ids=ids, logits_to_keep=1)
            cache = output.past_key_values
            cache.batch_repeat_interleave(n)
            logits_NV = output.logits[:, -1].expand(n, -1)
        else:
            output = self.model(input_ids=ids.repeat(n, 1), logits_to_keep=1, use_cache=True)
            cache = output.past_key_values
            logits_NV = output.logits[:, -1]
        most, limit = self.settings.max_tokens, self.max_length()
        for _ in range(most if limit is None else min(most, limit - len(prompt.ids))):
            tokens_N, logprobs_N = self._draw(logits_NV.float().cpu(), generators)
            for j in range(n):
                if is_open[j]:
                    drawn[j].append(tokens_N[j])
                    logprobs[j].append(logprobs_N[j])
                    is_open[j] = not self._has_ended(drawn[j])
            if not any(is_open):
                break
            step = torch.tensor(tokens_N, device=self.model.device).unsqueeze(1)
            output = self.model(input_ids=step, past_key_values=cache)
            logits_NV = output.logits[:, -1]
        return [
            Completion(self.endings.text(ids), ids, own_logprobs, "length" if cut_off else "stop")
            for ids, own_logprobs, cut_off in zip(drawn, logprobs, is_open, strict=True)
        ]

    def _draw(
        self, logits_NV: Float[Tensor, "N V"], generators: list[np.random.Generator]
    ) -> tuple[list[int], list[float]]:
        """A token for each row, and its log-probability in float32."""
        tokens_N = draw(logits_NV, self.settings, generators)
        logprobs_NV = logits_NV.log_softmax(-1)
        return tokens_N.tolist(), logprobs_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1).tolist()

    def _has_ended(self, ids: list[int]) -> bool:
        if ids[-1] in self.endings.ids:
            return True
        # A stop text of so many bytes is within as many tokens: none spells less than one.
        num_tokens = max((len(text.encode()) for text in self.endings.texts), default=0)
        return num_tokens > 0 and self.endings.cut(ids[-num_tokens:]) is not None


def draw(
    logits_NV: Float[Tensor, "N V"],
    settings: SamplingConfig,
    generators: list[np.random.Generator],
) -> Int64[Tensor, " N"]:
    """One token drawn from each row of logits_NV, on the CPU.

    Each generator gives one number in every call, also at temperature 0, where it decides nothing.
    """
    numbers_N = torch.tensor([generator.random() for generator in generators], dtype=torch.float64)
    if settings.temperature == 0:
        return logits_NV.argmax(-1)
    probs_NV = (logits_NV.double() / settings.temperature).softmax(-1)
    order_NV = None
    if settings.top_p < 1:
        probs_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
        before_NV = probs_NV.cumsum(-1) - probs_NV
        probs_NV = probs_NV.where(before_NV < settings.top_p, 0.0)
    totals_NV = probs_NV.cumsum(-1)
    # The last total is not exactly 1; the number's share of it picks the token.
    targets_N1 = (numbers_N * totals_NV[:, -1]).unsqueeze(1)
    places_N1 = torch.searchsorted(totals_NV, targets_N1, right=True)
    last_N1 = (probs_NV > 0).long().mul(torch.arange(probs_NV.shape[1])).amax(-1, keepdim=True)
    places_N1 = places_N1.minimum(last_N1)
    tokens_N1 = places_N1 if order_NV is None else order_NV.gather(1, places_N1)
    return tokens_N1.squeeze(1)


class VllmSampler(Sampler):
    """Sampling with vLLM. On CPUs its generator is torch's, which can't take a whole seed."""

    def __init__(self, config: GenerateConfig, encoder: Encoder, context: StageContext):
        self.settings = config.sampling
        if not torch.cuda.is_available() and self.settings.temperature > 0:
            context.log(
                "warning: vLLM on CPUs uses 32 bits of a seed: among many thousand prompts, two "
                "can draw the same numbers; backend: transformers uses the whole seed"
            )
        self.endings = Endings.read(config.model.path, encoder, self.settings.stop)
        self.engine = VllmEngine(
            config.model, config.vllm, context, sequences_per_prompt=self.settings.n
        )

    def max_length(self) -> int:
        return self.engine.longest

    def sample(self, prompts: list[Prompt]) -> list[list[Completion]]:
        outputs = self.engine.generate(
            [prompt.ids for prompt in prompts], [self._parameters(prompt) for prompt in prompts]
        )
        return [
            [self._completion(one) for one in sorted(output.outputs, key=lambda one: one.index)]
            for output in outputs
        ]

    def restart(self) -> None:
        self.engine.restart()

    def _parameters(self, prompt: Prompt) -> "SamplingParams":
        from vllm import SamplingParams

        settings = self.settings
        return SamplingParams(
            n=settings.n,
            seed=prompt.seed,  # vLLM gives sample j the seed + j
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=min(settings.max_tokens, self.engine.longest - len(prompt.ids)),
            stop=list(settings.stop),
            stop_token_ids=sorted(self.endings.ids),
            ignore_eos=True,  # it is among the stop_token_ids
            logprobs=0,  # of the drawn token alone
        )

    def _completion(self, output: "CompletionOutput") -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine gave up a sample: {output.finish_reason}")
        ids = list(output.token_ids)
        steps = zip(ids, output.logprobs, strict=True)
        return Completion(
            self.endings.text(ids),
            ids,
            [step[token].logprob for token, step in steps],
            output.finish_reason,
        )
