"""Write `RUN/dataset/rows.jsonl`: the prompts with their branches that are short enough.

row:     prompt_length       tokens before the answer
branch:  num_tokens          of the prompt and the branch, as training reads them
         completion_length   of them those that are trained
         is_reference_completion   false, where the branch does not say
"""

from post_training.annotate.annotate import annotate
from post_training.annotate.config import FilterConfig
from post_training.annotate.engine import load_encoder
from post_training.annotate.work import Annotator, Row
from post_training.data.branches import BRANCHES, conversations_of, prompt_of
from post_training.data.rows import COMPLETION, BadRow
from post_training.data.tokenize import Encoder
from post_training.stages.context import Result, StageContext


def run(config: FilterConfig, context: StageContext) -> Result:
    def make_annotator() -> Annotator:
        encoder = load_encoder(config.tokenizer, config.data)
        return LengthFilter(encoder, config.max_sequence_length, config.min_branches)

    return annotate(config, context, make_annotator)


class LengthFilter(Annotator):
    """Keeps the branches of at most max_sequence_length tokens, prompt included; a row with fewer
    than min_branches of them is rejected."""

    def __init__(self, encoder: Encoder, max_sequence_length: int, min_branches: int):
        self.encoder = encoder
        self.max_sequence_length = max_sequence_length
        self.min_branches = min_branches

    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        prompts = self.encoder.encode_prompts([prompt_of(row) for row in rows])
        return [
            self._filter(row, prompt if isinstance(prompt, BadRow) else len(prompt))
            for row, prompt in zip(rows, prompts, strict=True)
        ]

    def _filter(self, row: Row, prompt_length: int | BadRow) -> Row | BadRow:
        if isinstance(prompt_length, BadRow):
            return prompt_length
        self.num_tokens += prompt_length
        limit = self.max_sequence_length
        if prompt_length >= limit:
            return BadRow("too-long", f"a prompt of {prompt_length} tokens (the limit is {limit})")
        kept = []
        for branch, sequence in zip(
            row[BRANCHES], self.encoder.encode(conversations_of(row)), strict=True
        ):
            if isinstance(sequence, BadRow):
                return sequence
            self.num_tokens += len(sequence.ids)
            if len(sequence.ids) <= limit:
                lengths = {
                    "num_tokens": len(sequence.ids),
                    "completion_length": int((sequence.kinds == COMPLETION).sum()),
                }
                kept.append({"is_reference_completion": False, **branch, **lengths})
        if len(kept) < self.min_branches:
            problem = f"{len(kept)} of {len(row[BRANCHES])} branches within {limit} tokens"
            return BadRow("filtered", f"{problem} (min_branches is {self.min_branches})")
        return {**row, "prompt_length": prompt_length, BRANCHES: kept}
