"""Write `RUN/dataset/rows.jsonl`: each prompt with n more branches, drawn from the model.

row:     prompt_length, prompt_token_ids   what the samples go on from
branch:  is_reference_completion     true
         metadata                    {"model", "model_fingerprint"}
         completion_token_ids        as they were drawn, the end of the turn included
         completion_token_logprobs   of each, in nats, float32, at temperature 1
         completion_length           their number
         finish_reason               stop, or length: it was truncated
         seed                        of this sample
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer
from transformers import GenerationConfig

from post_training.annotate.annotate import annotate
from post_training.annotate.config import GenerateConfig
from post_training.annotate.work import Annotator, Row
from post_training.data.branches import BRANCHES, ID, new_branch, prompt_of
from post_training.data.rows import BadRow
from post_training.data.tokenize import Encoder
from post_training.models.load import read_model_settings
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext

# What is drawn, and from which seed.
#
# The seed of a prompt is made from the recipe's seed and the prompt's id, so that it depends
# neither on the chunk nor on the worker. Sample j of a prompt has seed + j; seeds of different
# prompts are further apart than n, so no two samples of a run have one seed, but with the chance
# that two of its prompts have the same 62 bits. (With one seed for all prompts of a batch, as in
# vllm#50884, they would be correlated.)
#
# A generator must take all of a seed. torch's on CPUs keeps 32 bits: among 20,000 prompts it is
# then as likely as not that two have the same numbers. So plain transformers gets them from numpy's
# Philox; vLLM on CPUs, whose generator is torch's, can't, and says so.


# Below 2^62, so that seed + j fits into the signed 64 bits of every generator.
_SEED_BITS = 62


@dataclass(frozen=True)
class Prompt:
    """ids: of its tokens. seed: of its first sample."""

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


def random_numbers(seed: int) -> np.random.Generator:
    """Of one sample: a stream of its own for each seed, whatever bits they differ in."""
    return np.random.Generator(np.random.Philox(key=seed))


def prompt_seed(seed: int, conversation_id: str, n: int) -> int:
    """Of the first of a prompt's n samples: a multiple of a power of two ≥ n.

    From sha256 over the two; the run's id is no part of it, since a reproduction has another.
    """
    digest = hashlib.sha256(f"{seed} {conversation_id}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") >> (64 - _SEED_BITS)
    stride_bits = (n - 1).bit_length()
    return number >> stride_bits << stride_bits


# Write `RUN/dataset/rows.jsonl`: each prompt with n more branches, drawn from the model.


def run(config: GenerateConfig, context: StageContext) -> Result:
    quiet_libraries(context.run_dir / "cache")
    from post_training.annotate.engine import load_encoder

    def make_annotator() -> Annotator:
        encoder = load_encoder(config.model.path, config.data)
        if config.backend == "vllm":
            from post_training.annotate.samplers import VllmSampler as Chosen
        else:
            from post_training.annotate.samplers import TransformersSampler as Chosen
        sampler = Chosen(config, encoder, context)
        return Generator(config, encoder, sampler, context.input_fingerprints["model.path"])

    result = annotate(config, context, make_annotator)
    if truncated := result.metrics.get("num_truncated"):
        kept = "left out" if config.exclude_truncated else "kept, and select leaves them out"
        limit = f"sampling.max_tokens: {config.sampling.max_tokens}"
        num_samples = config.sampling.n * result.metrics["num_rows"]
        context.log(
            f"{truncated:,} of {num_samples:,} samples were cut off at {limit}: {kept} "
            "(exclude_truncated)"
        )
    return result


class Generator(Annotator):
    def __init__(
        self, config: GenerateConfig, encoder: Encoder, sampler: Sampler, model_fingerprint: str
    ):
        self.num_truncated: int = 0
        self.config = config
        self.encoder = encoder
        self.sampler = sampler
        self.metadata = {
            "model": config.model_name or model_fingerprint,
            "model_fingerprint": model_fingerprint,
        }

    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        found = [
            self._prompt(row, ids)
            for row, ids in zip(
                rows, self.encoder.encode_prompts([prompt_of(row) for row in rows]), strict=True
            )
        ]
        good = [prompt for prompt in found if isinstance(prompt, Prompt)]
        samples = iter(self.sampler.sample(good))
        return [
            prompt if isinstance(prompt, BadRow) else self._row(row, prompt, next(samples))
            for row, prompt in zip(rows, found, strict=True)
        ]

    def recover(self) -> None:
        self.sampler.restart()

    def _prompt(self, row: Row, ids) -> Prompt | BadRow:
        if isinstance(ids, BadRow):
            return ids
        limit = self.sampler.max_length()
        if limit is not None and len(ids) >= limit:
            return BadRow("too-long", f"a prompt of {len(ids)} tokens (the model reads {limit})")
        seed = prompt_seed(self.config.seed, row[ID], self.config.sampling.n)
        return Prompt(ids.tolist(), seed)

    def _row(self, row: Row, prompt: Prompt, samples: list[Completion]) -> Row:
        self.num_tokens += sum(len(sample.token_ids) for sample in samples)
        self.num_truncated += sum(sample.finish_reason == "length" for sample in samples)
        branches = [
            self._branch(sample, prompt.seed + number)
            for number, sample in enumerate(samples)
            if sample.finish_reason != "length" or not self.config.exclude_truncated
        ]
        return {
            **row,
            "prompt_length": len(prompt.ids),
            "prompt_token_ids": prompt.ids,
            BRANCHES: [*row[BRANCHES], *branches],
        }

    def _branch(self, sample: Completion, seed: int) -> dict:
        return {
            **new_branch(sample.text, is_reference=True, metadata=self.metadata),
            "completion_token_ids": sample.token_ids,
            "completion_token_logprobs": sample.logprobs,
            "completion_length": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "seed": seed,
        }


# What ends a sample, and what of it is text.


@dataclass(frozen=True)
class Endings:
    """ids: a token that ends a sample. texts: a text that does, as soon as it is there."""

    ids: frozenset[int]
    texts: tuple[str, ...]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, model: Path, encoder: Encoder, texts: list[str]) -> "Endings":
        """The ids: those that the model's folder names, the tokenizer's eos, and the template's
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
        """Of a sample's tokens: without the end of the turn, special tokens and the stop text."""
        if ids[-1] in self.ids:
            ids = ids[:-1]
        cut = self.cut(ids)
        return self._decode(ids) if cut is None else cut

    def cut(self, ids: list[int]) -> str | None:
        """What stands before the first stop text; None when there is none."""
        text = self._decode(ids)
        places = [place for stop in self.texts if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
