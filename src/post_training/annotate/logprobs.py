"""Add log-probabilities to rows: RUN/dataset/rows.jsonl, and reference.json, which says whose.

    a branch          completion_ref_logprob, completion_length
    a preference row  ref_chosen_logprob, chosen_length, ref_rejected_logprob, rejected_length

Sums over the tokens of the answer, in nats, and their number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING, Any, Protocol

from post_training.annotate.annotate import annotate
from post_training.annotate.config import LogprobsConfig
from post_training.annotate.engine import VllmEngine, load_encoder, load_own_tokenizer
from post_training.annotate.work import Annotator, Row
from post_training.data.branches import (
    BRANCHES,
    conversations_of,
    prompt_of,
)
from post_training.data.preference_rows import read_written_pair
from post_training.data.rows import COMPLETION, SIDES, BadRow, Conversation
from post_training.data.tokenize import Encoder
from post_training.models.attention import most_positions
from post_training.models.device import move_to_device
from post_training.models.left_out import describe_left_out
from post_training.models.load import check_vocabulary, load_model
from post_training.models.logits import slower_float32_logits
from post_training.models.reference import reference_of
from post_training.models.score import Asked, CompletionLogprob, LogprobScorer
from post_training.stages.context import Result, StageContext

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


def run(config: LogprobsConfig, context: StageContext) -> Result:
    path = config.model.path
    tokenizer = load_own_tokenizer(path, config.data)
    encoder = load_encoder(path, config.data)

    def make_annotator() -> LogprobAnnotator:
        if config.backend == "vllm":
            engine = VllmEngine(config.model, config.vllm, context, sequences_per_prompt=1)
            return LogprobAnnotator(encoder, VllmScorer(engine), engine.longest, engine.restart)
        model = load_model(
            path,
            dtype=config.model.dtype,
            attn_implementation=config.model.attn_implementation,
            tensor_parallel_size=config.tensor_parallel_size,
        )
        if (left_out := describe_left_out(model, path)) is not None:
            context.log(f"warning: {left_out}")
        check_vocabulary(model, tokenizer)
        model = move_to_device(model, context.ranks.local_rank)
        if config.model.float32_logits and (slower := slower_float32_logits(model.device.type)):
            context.log(slower)
        scorer = LogprobScorer(
            model,
            max_batch_tokens=config.max_batch_tokens,
            prompts_per_batch=config.prompts_per_batch,
            float32_logits=config.model.float32_logits,
        )
        return LogprobAnnotator(encoder, scorer, most_positions(model.config))

    return annotate(
        config,
        context,
        make_annotator,
        reference=lambda: reference_of(
            path, tokenizer, encoder.template.text, config.model.dtype, config.backend
        ),
    )


@dataclass(frozen=True)
class Answer:
    """prompt, ids: token ids. asked: of each of ids, whether it is the assistant's."""

    prompt: list[int]
    ids: list[int]
    asked: list[bool]


class Scorer(Protocol):
    def score(self, prompts: Sequence[Asked]) -> list[list[CompletionLogprob]]:
        """The log-probability of each completion of each prompt; `asked` is given for all."""


class LogprobAnnotator(Annotator):
    """Adds the log-probabilities of a row's answers to it.

    The tokens of an answer are those that a model sampled, where the row has them: never its text
    tokenised again, which may give others. Else they are those that training would see, masks
    included.

    max_length: of a prompt with an answer, in tokens. restart: starts a scorer anew that died.
    """

    def __init__(
        self,
        encoder: Encoder,
        scorer: Scorer,
        max_length: int | None,
        restart: Callable[[], None] | None = None,
    ):
        self._encoder = encoder
        self._scorer = scorer
        self._max_length = max_length
        self._restart = restart

    def recover(self) -> None:
        if self._restart is not None:
            self._restart()

    def __call__(self, rows: list[Row]) -> list[Row | BadRow]:
        answers: list[list[Answer] | BadRow] = []
        for row in rows:
            try:
                answers.append(self._answers(row))
            except BadRow as bad:
                answers.append(bad)
        found = iter(self._score([each for each in answers if not isinstance(each, BadRow)]))
        return [
            own if isinstance(own, BadRow) else _add_logprobs(row, next(found))
            for row, own in zip(rows, answers, strict=True)
        ]

    def _answers(self, row: Row) -> list[Answer]:
        """The answers of the row's branches, or of its two sides. Errors: BadRow."""
        if BRANCHES in row:
            prompt, conversations = prompt_of(row), conversations_of(row)
            sampled = [branch.get("completion_token_ids") for branch in row[BRANCHES]]
            keys = [f"{BRANCHES}[{index}]" for index in range(len(sampled))]
        else:
            pair = read_written_pair(row)
            prompt = Conversation(pair.prompt, pair.tools)
            conversations = [
                Conversation(pair.prompt + answer, pair.tools)
                for answer in (pair.chosen, pair.rejected)
            ]
            sampled = [row.get(f"{side}_token_ids") for side in SIDES]
            keys = list(SIDES)
        prompt_ids = None
        if any(ids is not None for ids in sampled):
            prompt_ids = self._prompt_ids(prompt, row.get("prompt_token_ids"))
        return [
            self._answer(key, conversation, prompt_ids, ids)
            for key, conversation, ids in zip(keys, conversations, sampled, strict=True)
        ]

    def _prompt_ids(self, prompt: Conversation, stored: list[int] | None) -> list[int]:
        """The prompt's token ids.

        stored: the ids that the answers were sampled after. Errors: BadRow where the template gives
        others: the sampled ids may then be another tokenizer's.
        """
        [encoded] = self._encoder.encode_prompts([prompt])
        if isinstance(encoded, BadRow):
            raise encoded
        if stored not in (None, encoded.tolist()):
            problem = "the answers were sampled after other tokens than this model and template "
            raise BadRow("failed", f"prompt_token_ids: {problem}give the prompt")
        return encoded.tolist()

    def _answer(
        self,
        key: str,
        conversation: Conversation,
        prompt: list[int] | None,
        sampled: list[int] | None,
    ) -> Answer:
        if sampled is None:
            answer = self._tokenise(key, conversation)
        elif not sampled:
            raise BadRow("untrained", f"{key}: no token was sampled")
        else:
            assert prompt is not None
            answer = Answer(prompt, sampled, [True] * len(sampled))
        length = len(answer.prompt) + len(answer.ids)
        if self._max_length is not None and length > self._max_length:
            problem = f"{key}: {length} tokens (the model reads {self._max_length})"
            raise BadRow("failed", problem)
        return answer

    def _tokenise(self, key: str, conversation: Conversation) -> Answer:
        [sequence] = self._encoder.encode([conversation])
        if isinstance(sequence, BadRow):
            raise BadRow(sequence.reason, f"{key}: {sequence.problem}")
        asked = (sequence.kinds == COMPLETION).nonzero()[0]
        first, end = int(asked[0]), int(asked[-1]) + 1
        if first == 0:
            raise BadRow("roles", f"{key}: nothing stands before the answer")
        ids = sequence.ids.tolist()
        return Answer(
            ids[:first], ids[first:end], (sequence.kinds[first:end] == COMPLETION).tolist()
        )

    def _score(self, answers: list[list[Answer]]) -> list[list[CompletionLogprob]]:
        """Of each row's answers. Those of one row nearly always have one prompt in common, which is
        then read once."""
        prompts: list[Asked] = []
        places: list[list[tuple[int, int]]] = []
        for own in answers:
            numbers: dict[tuple[int, ...], int] = {}
            places.append([])
            for answer in own:
                number = numbers.setdefault(tuple(answer.prompt), len(prompts))
                if number == len(prompts):
                    prompts.append(Asked(answer.prompt, [], []))
                prompt = prompts[number]
                places[-1].append((number, len(prompt.completions)))
                prompts[number] = replace(
                    prompt,
                    completions=[*prompt.completions, answer.ids],
                    asked=[*prompt.asked, answer.asked],
                )
                self.num_tokens += sum(answer.asked)
        scores = self._scorer.score(prompts)
        return [[scores[number][index] for number, index in own] for own in places]


def _add_logprobs(row: Row, scores: list[CompletionLogprob]) -> Row:
    if BRANCHES in row:
        branches = [
            {**branch, "completion_ref_logprob": each.logprob, "completion_length": each.num_tokens}
            for branch, each in zip(row[BRANCHES], scores, strict=True)
        ]
        return {**row, BRANCHES: branches}
    added: dict[str, Any] = {}
    for side, each in zip(SIDES, scores, strict=True):
        added |= {f"ref_{side}_logprob": each.logprob, f"{side}_length": each.num_tokens}
    return {**row, **added}


class VllmScorer:
    """Scoring with vLLM, from its prompt_logprobs.

    The engine is given the prompt and all of the answer but its last token, and asked for that one
    as what comes next: an answer that fills the model to its last position leaves no room for more.
    It draws a token too, which nobody looks at. Each term is float32, the sum float64, as in
    models/score.py.
    """

    def __init__(self, engine: VllmEngine):
        self._engine = engine

    def score(self, prompts: Sequence[Asked]) -> list[list[CompletionLogprob]]:
        """As Scorer.score."""
        answers = [(prompt, completion) for prompt in prompts for completion in prompt.completions]
        outputs = iter(
            self._engine.generate(
                [[*prompt.ids, *completion[:-1]] for prompt, completion in answers],
                [_parameters(completion[-1]) for _, completion in answers],
            )
        )
        return [
            [
                _sum_asked(_terms(next(outputs), len(prompt.ids), completion), asked)
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


def _sum_asked(terms: list[float], asked: Sequence[bool]) -> CompletionLogprob:
    counted = [term for term, counts in zip(terms, asked, strict=True) if counts]
    return CompletionLogprob(fsum(counted), len(counted))
