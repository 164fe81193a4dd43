"""What is drawn, and from which seed.

The seed of a prompt is made from the recipe's seed and the prompt's id, so that it depends neither
on the chunk nor on the worker. Sample j of a prompt has seed + j; seeds of different prompts are
further apart than n, so no two samples of a run have one seed, but with the chance that two of its
prompts have the same 62 bits. (With one seed for all prompts of a batch, as in vllm#50884, they
would be correlated.)

A generator must take all of a seed. torch's on CPUs keeps 32 bits: among 20,000 prompts it is then
as likely as not that two have the same numbers. So plain transformers gets them from numpy's
Philox; vLLM on CPUs, whose generator is torch's, can't, and says so.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np

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
