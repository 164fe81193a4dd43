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

import numpy as np
from jaxtyping import Int32

from post_training.annotate.annotate import annotate
from post_training.annotate.config import GenerateConfig
from post_training.annotate.engine import load_encoder
from post_training.annotate.samplers import (
    Completion,
    Prompt,
    Sampler,
    TransformersSampler,
    VllmSampler,
    prompt_seed,
)
from post_training.annotate.work import Annotator, Row
from post_training.data.branches import BRANCHES, ID, new_branch, prompt_of
from post_training.data.rows import BadRow
from post_training.data.tokenize import Encoder
from post_training.stages.context import Result, StageContext


def run(config: GenerateConfig, context: StageContext) -> Result:
    def make_annotator() -> Annotator:
        encoder = load_encoder(config.model.path, config.data)
        sampler_class = VllmSampler if config.backend == "vllm" else TransformersSampler
        sampler = sampler_class(config, encoder, context)
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
    """Adds the samples of a prompt to its row. model_fingerprint: said in each branch."""

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

    def _prompt(self, row: Row, ids: Int32[np.ndarray, " T"] | BadRow) -> Prompt | BadRow:
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
