"""Scoring with vLLM (annotation/vllm_engine.py), from its prompt_logprobs.

The engine is given the prompt and all of the answer but its last token, and asked for that one as
what comes next: an answer that fills the model to its last position leaves no room for more. It
draws a token too, which nobody looks at. Each term is float32, the sum float64, as in
models/completion_logprobs.py.
"""

from collections.abc import Sequence
from math import fsum
from typing import TYPE_CHECKING

from post_training.models.completion_logprobs import Asked, CompletionLogprob
from post_training.stages.annotation.vllm_engine import VllmEngine

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


class VllmScorer:
    def __init__(self, engine: VllmEngine):
        self._engine = engine

    def score(self, prompts: Sequence[Asked]) -> list[list[CompletionLogprob]]:
        """Of each completion of each prompt."""
        answers = [(prompt, completion) for prompt in prompts for completion in prompt.completions]
        outputs = iter(
            self._engine.generate(
                [[*prompt.ids, *completion[:-1]] for prompt, completion in answers],
                [_parameters(completion[-1]) for _, completion in answers],
            )
        )
        return [
            [
                _summed(_terms(next(outputs), len(prompt.ids), completion), asked)
                for completion, asked in zip(prompt.completions, prompt.asked, strict=True)
            ]
            for prompt in prompts
        ]


def _parameters(last: int) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0,
        prompt_logprobs=0,  # of the prompt's own tokens alone
        logprob_token_ids=[last],
        flat_logprobs=True,  # else a dictionary for each token of the prompt
        detokenize=False,
    )


def _terms(output: "RequestOutput", prompt_length: int, completion: Sequence[int]) -> list[float]:
    """log p of each token of the completion."""
    within = [
        output.prompt_logprobs[prompt_length + t][token].logprob
        for t, token in enumerate(completion[:-1])
    ]
    [drawn] = output.outputs
    return [*within, drawn.logprobs[0][completion[-1]].logprob]


def _summed(terms: list[float], asked: Sequence[bool]) -> CompletionLogprob:
    counted = [term for term, counts in zip(terms, asked, strict=True) if counts]
    return CompletionLogprob(fsum(counted), len(counted))
