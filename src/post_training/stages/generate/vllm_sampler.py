"""Sampling with vLLM (annotation/vllm_engine.py)."""

from typing import TYPE_CHECKING

import torch

from post_training.data.tokenize import Encoder
from post_training.stages.annotation.vllm_engine import VllmEngine
from post_training.stages.context import StageContext
from post_training.stages.generate.config import GenerateConfig
from post_training.stages.generate.endings import Endings
from post_training.stages.generate.sampling import Completion, Prompt, Sampler

if TYPE_CHECKING:
    from vllm import CompletionOutput, SamplingParams


class VllmSampler(Sampler):
    def __init__(self, config: GenerateConfig, encoder: Encoder, context: StageContext):
        self.settings = config.sampling
        if not torch.cuda.is_available() and self.settings.temperature > 0:
            context.log(
                "warning: vLLM on CPUs uses 32 bits of a seed: among many thousand prompts, two "
                "can draw the same numbers; backend: transformers uses the whole seed"
            )
        self.endings = Endings.of(config.model.path, encoder, self.settings.stop)
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
