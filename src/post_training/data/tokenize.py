"""Rows to token ids, and what a loss makes of each token.

The ids are those of the whole text, as `tokenizer.apply_chat_template` gives them; never of pieces
of it. A token is trained when any of its characters is. A model predicts token t from those before
it, so what is said of the token at position 0 counts for nothing.

Which tokens hold the characters of a span is found in two ways, with equal results.
*Offsets*: the tokenizers library is asked for the token of a character; right for every tokenizer.
*Byte lengths*: in byte-level BPE each id spells a fixed string of bytes, so running totals of the
lengths find all spans of a batch at once, and the library needn't keep offsets (a tenth of its
time). Whether a text is spelled by its ids without loss is checked text by text; one that is not
goes the first way.
"""

import json
import re
import unicodedata
from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from tokenizers import Encoding, Tokenizer

from post_training.core.errors import PostTrainingError
from post_training.data.chat.layout import (
    control_pattern,
    lay_out,
    lay_out_prompt,
    tokenizer_state,
)
from post_training.data.chat.proof import PROBE
from post_training.data.chat.rendering import Part, Spans
from post_training.data.chat.templates import ChatTemplate
from post_training.data.chat.turns import Written
from post_training.data.rows import COMPLETION, BadRow, Conversation, Text
from post_training.data.word_tokenizer import WordTokenizer, is_empty_step

# Steps of a tokenizer that split a text, and at most remove some of it; they don't add to it.
_SPLITTING = {"Split", "Digits", "Punctuation"}
# The length of an id that stands for anything (unk): longer than any text, so that none equals it.
_UNKNOWN_LENGTH = 1 << 40


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of one row. kinds: PROMPT, COMPLETION or EXCLUDED. weights: of each token in the
    loss, or None when each is 1."""

    ids: Int32[np.ndarray, " T"]
    kinds: UInt8[np.ndarray, " T"]
    weights: Float32[np.ndarray, " T"] | None = None


@dataclass(frozen=True)
class EncodedRow:
    """What a row is trained as: one sequence, or several, each with other turns. num_left_out: the
    thoughts of earlier turns that they don't have, since a server won't send them."""

    sequences: list[TokenSequence]
    num_left_out: int = 0


@dataclass(frozen=True)
class ByteLengths:
    """of_id: the bytes that each id spells. composed: whether the tokenizer first
    composes characters (NFC), so that only a composed text is what the ids spell."""

    of_id: Int64[np.ndarray, " V"]
    composed: bool


@dataclass(frozen=True)
class Encoder:
    """Rows to token ids. Made once by `create`; picklable, so that worker processes can have it.

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
        state = tokenizer_state(tokenizer)
        if state["model"].get("dropout"):
            raise PostTrainingError("has dropout, so its ids would be random", where=where)
        # Of the whole tokenizer, whose post-processor may put a bos token before a text.
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

    def encode(self, rows: SequenceOf[Conversation | Text]) -> list[TokenSequence | BadRow]:
        """One result for each row, in order. Errors: those of encode_rows."""
        results: list[TokenSequence | BadRow] = []
        for encoded in self.encode_rows(rows):
            if isinstance(encoded, BadRow):
                results.append(encoded)
            elif len(encoded.sequences) == 1:
                results.append(encoded.sequences[0])
            else:
                problem = "the chat template writes an earlier turn otherwise than it was said"
                hint = "train on the last turn alone, or set data.history_thoughts: keep"
                results.append(BadRow("roles", problem, hint))
        return results

    def encode_rows(self, rows: SequenceOf[Conversation | Text]) -> list["EncodedRow | BadRow"]:
        """What each row is trained as, in order.

        Errors: PostTrainingError for a text, when there is no eos token to end it with.
        """
        layouts: list[list[Written] | BadRow] = []
        for row in rows:
            try:
                layouts.append(lay_out(row, self.template, self.special_tokens, self.control))
            except BadRow as bad:
                layouts.append(bad)
        good = [one for each in layouts if not isinstance(each, BadRow) for one in each]
        encoded = zip(good, *self._ids_and_spans(good), strict=True)
        results: list[EncodedRow | BadRow] = []
        for row, own in zip(rows, layouts, strict=True):
            if isinstance(own, BadRow):
                results.append(own)
                continue
            sequences = []
            for _, ids, spans in islice(encoded, len(own)):
                if isinstance(row, Text):
                    sequences.append(self._document(ids))
                else:
                    sequences.append(_sequence(ids, spans, own[len(sequences)].parts))
            bad = next((each for each in sequences if isinstance(each, BadRow)), None)
            left_out = sum(each.num_left_out for each in own)
            results.append(bad or EncodedRow(sequences, left_out))
        return results

    def encode_prompts(
        self, rows: SequenceOf[Conversation]
    ) -> list[Int32[np.ndarray, " _"] | BadRow]:
        """The ids that a model goes on from, of each row, or why there are none.

        They are all that stands before the next answer of the assistant: the beginning of what
        training sees, up to the mark of the answer.
        """
        texts: list[Written | BadRow] = []
        for row in rows:
            try:
                text = lay_out_prompt(row, self.template, self.special_tokens, self.control)
            except BadRow as bad:
                texts.append(bad)
            else:
                texts.append(Written(text, [], []))
        good = [each for each in texts if isinstance(each, Written)]
        ids = iter(self._ids_and_spans(good)[0])
        return [bad if isinstance(bad, BadRow) else next(ids) for bad in texts]

    def _ids_and_spans(
        self, layouts: list[Written]
    ) -> tuple[list[Int32[np.ndarray, " _"]], list[Spans]]:
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
        # Unsigned, which Python fills four times as fast; ids are below 2**31, so int32 reads them.
        flat = array("I")
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

    def _document(self, ids: Int32[np.ndarray, " T"]) -> TokenSequence | BadRow:
        if self.eos_id is None:
            hint = "set data.special_tokens.eos_token"
            raise PostTrainingError("the tokenizer has no eos token to end a text with", hint=hint)
        ids = np.concatenate([self.bos_ids, ids, [self.eos_id]]).astype(np.int32)
        if len(ids) < 2:
            return BadRow("untrained", "no token to train on")
        return TokenSequence(ids, np.full(len(ids), COMPLETION, np.uint8))

    def _prove_masks(self) -> None:
        """Try the mask on the template's probe: the trained tokens must spell the trained turns."""
        layouts = lay_out(PROBE, self.template, self.special_tokens, None)
        trained = "".join(
            self.backend.decode(ids[start:end].tolist(), skip_special_tokens=False)
            for ids, spans in zip(*self._ids_and_spans(layouts), strict=True)
            for start, end in spans
        )
        expected = "".join(each.text[start:end] for each in layouts for start, end in each.spans)
        # Tokenizers differ in the spaces they put back between words.
        if "".join(trained.split()) != "".join(expected.split()):
            raise PostTrainingError(
                f"the tokenizer's offsets don't mark the trained turns: {trained!r} "
                f"instead of {expected!r}",
                where=f"chat template {self.template.name!r}",
            )


def _sequence(
    ids: Int32[np.ndarray, " T"], spans: Spans, parts: list[Part]
) -> TokenSequence | BadRow:
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
    return TokenSequence(ids, kinds, weights)


def byte_lengths(backend: dict[str, Any]) -> ByteLengths | None:
    """How many bytes each id spells; None where that is not fixed. backend: a tokenizer.json."""
    model, normalizer = backend["model"], backend["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if is_empty_step(normalizer):
        normalizer = None
    elif normalizer["type"] != "NFC":
        return None
    steps = backend["pre_tokenizer"] or {"type": "none"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0]["add_prefix_space"]:
        return None
    if not {step["type"] for step in steps} <= {*_SPLITTING, "ByteLevel"}:
        return None
    added = {token["id"]: len(token["content"].encode()) for token in backend["added_tokens"]}
    of_id = np.full(max([*model["vocab"].values(), *added], default=0) + 1, _UNKNOWN_LENGTH)
    for token, index in model["vocab"].items():
        if token != model.get("unk_token"):
            of_id[index] = len(token)  # each character stands for a byte
    for index, length in added.items():
        of_id[index] = length
    return ByteLengths(of_id, normalizer is not None)


def spans_by_bytes(
    lengths: ByteLengths,
    ids: Int32[np.ndarray, " T"],
    ends: Int64[np.ndarray, " R"],
    texts: list[str],
    spans: list[list[tuple[int, int]]],
) -> list[list[tuple[int, int]] | None]:
    """The spans of each text in its tokens; None for a text that its ids don't spell.

    ids: of all texts. ends: where each text's ids end. spans: in characters.
    """
    byte_ends = np.cumsum(lengths.of_id.take(ids))  # [N]
    text_ends = np.where(ends > 0, byte_ends[ends - 1], 0).tolist() if len(ids) else [0] * len(ends)
    boundaries: list[int] = []
    spelled: list[bool] = []
    offset = 0
    for text, text_end, own in zip(texts, text_ends, spans, strict=True):
        positions = [position for span in own for position in span]
        size = len(text)
        if not text.isascii():
            positions = _in_bytes(text, positions)
            size = len(text.encode())
        boundaries += [offset + position for position in positions]
        spelled.append(
            size == text_end - offset
            and (not lengths.composed or unicodedata.is_normalized("NFC", text))
        )
        offset = text_end
    num_spans = list(map(len, spans))
    first_tokens = np.repeat(np.concatenate([[0], ends])[: len(ends)], num_spans)
    starts = np.searchsorted(byte_ends, boundaries[0::2], side="right") - first_tokens
    stops = np.searchsorted(byte_ends, boundaries[1::2], side="left") + 1 - first_tokens
    found = list(zip(starts.tolist(), stops.tolist(), strict=True))
    last_spans = accumulate(num_spans)
    return [
        found[last - number : last] if exact else None
        for exact, number, last in zip(spelled, num_spans, last_spans, strict=True)
    ]


def _in_bytes(text: str, positions: list[int]) -> list[int]:
    """positions: in characters, ascending."""
    in_bytes, done, total = [], 0, 0
    for position in positions:
        total += len(text[done:position].encode())
        done = position
        in_bytes.append(total)
    return in_bytes


def spans_by_offsets(encoding: Encoding, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of one text in its tokens. A character may have no token (it was normalised away,
    or only stood for a boundary of words); then the next one within the span counts."""
    found = []
    for start, end in spans:
        first = next(_tokens_of(encoding, range(start, end)), None)
        last = next(_tokens_of(encoding, range(end - 1, start - 1, -1)), None)
        if first is None or last is None:
            found.append((0, 0))
            continue
        # A character of several tokens was found by its first.
        while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:
            last += 1
        found.append((first, last + 1))
    return found


def _tokens_of(encoding: Encoding, positions: range) -> Iterator[int]:
    for position in positions:
        if (token := encoding.char_to_token(position)) is not None:
            yield token
