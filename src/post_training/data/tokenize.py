"""Rows to token ids, and what a loss makes of each token.

The ids are those of the whole text, as `tokenizer.apply_chat_template` gives them; never of pieces
of it. A token is trained when any of its characters is (token_spans.py). A model predicts token t
from those before it, so what is said of the token at position 0 counts for nothing.
"""

import json
import re
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from post_training.core.errors import PostTrainingError
from post_training.data.chat.layout import Layout, control_pattern, lay_out
from post_training.data.chat.proof import PROBE
from post_training.data.chat.rendering import Part, Spans
from post_training.data.chat.templates import ChatTemplate
from post_training.data.rows import COMPLETION, BadRow, Conversation, Message, Text
from post_training.data.token_spans import (
    ByteLengths,
    byte_lengths,
    spans_by_bytes,
    spans_by_offsets,
)
from post_training.data.word_tokenizer import WordTokenizer

# Stands where the model's answer will.
_ANSWER = Message("assistant", "answer", COMPLETION)


@dataclass(frozen=True)
class Sequence:
    """ids: int32 [T]. kinds: uint8 [T], PROMPT, COMPLETION or EXCLUDED. weights: float32 [T], of
    each token in the loss, or None when each is 1."""

    ids: np.ndarray
    kinds: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True)
class Encoder:
    """Made once by `create`; picklable, so that worker processes can have it.

    backend: the tokenizers library's part of the tokenizer. special_tokens: by the names that a
    template has for them. control: finds what a content may not hold. bos_ids: what the tokenizer
    itself puts before a text. words: the faster way to the same ids, where there is one.
    """

    template: ChatTemplate
    backend: Tokenizer
    special_tokens: dict[str, str]
    control: re.Pattern[str] | None
    bos_ids: tuple[int, ...]
    eos_id: int | None
    lengths: ByteLengths | None
    words: WordTokenizer | None

    @classmethod
    def create(
        cls, tokenizer: Any, template: ChatTemplate, *, control_tokens: Literal["refuse", "keep"]
    ) -> "Encoder":
        """Errors: PostTrainingError when the tokenizer is not one of the tokenizers library, or
        draws tokens at random, or the masks of a probe don't spell what is to be trained."""
        where = "the tokenizer"
        if not tokenizer.is_fast:
            raise PostTrainingError("is not a fast one, so it can't place its tokens", where=where)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        if state["model"].get("dropout"):
            raise PostTrainingError("has dropout, so its ids would be random", where=where)
        # A limit is not ours to apply, and what a post-processor adds or trims would be in the way.
        state["truncation"] = state["padding"] = state["post_processor"] = None
        first_ids = tokenizer("a")["input_ids"][:1]
        backend, lengths = Tokenizer.from_str(json.dumps(state)), byte_lengths(state)
        special_tokens = dict(tokenizer.special_tokens_map)
        control = None
        if control_tokens == "refuse":
            control = control_pattern(state, template, special_tokens)
        encoder = cls(
            template=template,
            backend=backend,
            special_tokens=special_tokens,
            control=control,
            bos_ids=tuple(first_ids) if first_ids == [tokenizer.bos_token_id] else (),
            eos_id=tokenizer.eos_token_id,
            lengths=lengths,
            words=None if lengths is None else WordTokenizer.create(backend, state),
        )
        encoder._prove_masks()
        return encoder

    def encode(self, rows: SequenceOf[Conversation | Text]) -> list[Sequence | BadRow]:
        """One result for each row, in order.

        Errors: PostTrainingError for a text, when there is no eos token to end it with.
        """
        layouts: list[Layout | BadRow] = []
        for row in rows:
            try:
                layouts.append(lay_out(row, self.template, self.special_tokens, self.control))
            except BadRow as bad:
                layouts.append(bad)
        good = [layout for layout in layouts if isinstance(layout, Layout)]
        encoded = zip(good, *self._ids_and_spans(good), strict=True)
        results: list[Sequence | BadRow] = []
        for row, layout in zip(rows, layouts, strict=True):
            if isinstance(layout, BadRow):
                results.append(layout)
                continue
            _, ids, spans = next(encoded)
            if isinstance(row, Text):
                results.append(self._document(ids))
            else:
                results.append(_sequence(ids, spans, layout.parts))
        return results

    def encode_prompts(self, rows: SequenceOf[Conversation]) -> list[np.ndarray | BadRow]:
        """int32 [P] of each: all that stands before the next answer of the assistant, which the
        model goes on from; the beginning of what training sees, up to the mark of the answer."""
        layouts: list[Layout | BadRow] = []
        for row in rows:
            answered = Conversation((*row.messages, _ANSWER), row.tools)
            try:
                layout = lay_out(answered, self.template, self.special_tokens, self.control)
            except BadRow as bad:
                layouts.append(bad)
            else:
                layouts.append(Layout(layout.text[: layout.spans[-1][0]], [], []))
        good = [layout for layout in layouts if isinstance(layout, Layout)]
        ids = iter(self._ids_and_spans(good)[0])
        return [bad if isinstance(bad, BadRow) else next(ids) for bad in layouts]

    def _ids_and_spans(self, layouts: list[Layout]) -> tuple[list[np.ndarray], list[Spans]]:
        """The ids of each text, and its spans in tokens."""
        texts = [layout.text for layout in layouts]
        spans = [layout.spans for layout in layouts]
        encodings: list[Encoding] = []
        if self.words is not None:
            lists = self.words.encode(texts)
        else:
            fast, whole = self.backend.encode_batch_fast, self.backend.encode_batch
            encodings = (whole if self.lengths is None else fast)(texts, add_special_tokens=False)
            lists = (encoding.ids for encoding in encodings)
        flat = array("I")  # filled four times as fast as one of signed integers
        ends = []
        for each in lists:
            flat.fromlist(each)
            ends.append(len(flat))
        ids = np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32)
        if self.lengths is None:
            found = [spans_by_offsets(*each) for each in zip(encodings, spans, strict=True)]
        else:
            found = spans_by_bytes(self.lengths, ids, np.array(ends, np.int64), texts, spans)
            for index, own in enumerate(found):
                if own is None:
                    encoding = self.backend.encode(texts[index], add_special_tokens=False)
                    found[index] = spans_by_offsets(encoding, spans[index])
        return [ids[start:end] for start, end in pairwise([0, *ends])], found

    def _document(self, ids: np.ndarray) -> Sequence | BadRow:
        if self.eos_id is None:
            hint = "set data.special_tokens.eos_token"
            raise PostTrainingError("the tokenizer has no eos token to end a text with", hint=hint)
        ids = np.concatenate([self.bos_ids, ids, [self.eos_id]]).astype(np.int32)
        if len(ids) < 2:
            return BadRow("untrained", "no token to train on")
        return Sequence(ids, np.full(len(ids), COMPLETION, np.uint8))

    def _prove_masks(self) -> None:
        """Try the mask on the template's probe: the trained tokens must spell the trained turns."""
        layout = lay_out(PROBE, self.template, self.special_tokens, None)
        [[ids], [spans]] = self._ids_and_spans([layout])
        trained = "".join(
            self.backend.decode(ids[start:end].tolist(), skip_special_tokens=False)
            for start, end in spans
        )
        expected = "".join(layout.text[start:end] for start, end in layout.spans)
        # Tokenizers differ in the spaces they put back between words.
        if "".join(trained.split()) != "".join(expected.split()):
            raise PostTrainingError(
                f"the tokenizer's offsets don't mark the trained turns: {trained!r} "
                f"instead of {expected!r}",
                where=f"chat template {self.template.name!r}",
            )


def _sequence(ids: np.ndarray, spans: Spans, parts: list[Part]) -> Sequence | BadRow:
    kinds = np.zeros(len(ids), np.uint8)  # PROMPT
    weights = None
    trained = False
    for (start, end), part in zip(spans, parts, strict=True):
        kinds[start:end] = part.kind
        if part.kind == COMPLETION:
            trained = trained or (part.weight > 0 and end > max(start, 1))
            if part.weight != 1:
                weights = np.ones(len(ids), np.float32) if weights is None else weights
                weights[start:end] = part.weight
    if not trained:
        return BadRow("untrained", "no token to train on")
    return Sequence(ids, kinds, weights)
