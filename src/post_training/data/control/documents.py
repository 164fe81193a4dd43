"""Documents with control markers, as they are written for GPT-NeoX on LUMI:

    <<<|user|>>>2 + 2?<<<|user|>>><<<|assistant|>>>4<<<|assistant|>>>
    -> [user] 2 + 2? [user] [assistant] 4 [assistant] [eod]

A turn stands between two copies of its marker; turns alternate, the user first, and nothing stands
between them. Only these markers count, everything else is text. Each turn's text is encoded on its
own (SpanTokenizer). The loss is on what the assistant wrote, the marker that closes it, and the end
of document.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Int32, Int64, UInt8
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError, UsageError, shown
from post_training.data.rows import COMPLETION, PROMPT, BadRow

Piece = ModelProto.SentencePiece
ROLES = ("user", "assistant")
_MARKER = re.compile(r"<<<\|(user|assistant)\|>>>")


@runtime_checkable
class SpanTokenizer(Protocol):
    """Encodes spans: stretches of text between control tokens, each encoded on its own.

    So a SentencePiece model gives every span a dummy prefix (▁). The control tokens around the
    spans are written by id (DocumentEncoder.join). Can be sent to another process.
    vocab_size: every id is below it. control_ids: may serve as control tokens, because no word is
    made of them. special_ids: those of them that a text must not spell out.
    """

    vocab_size: int
    control_ids: frozenset[int]
    special_ids: frozenset[int]

    def encode(self, spans: list[str]) -> list[list[int]]: ...

    def piece_of(self, token: int) -> str: ...

    def id_of(self, piece: str) -> int | None: ...


def load_span_tokenizer(path: Path) -> SpanTokenizer:
    """The tokenizer at `path`: a SentencePiece model, or a folder with a tokenizer.json.

    Errors: PostTrainingError for anything else.
    """
    return HuggingFaceSpans(path) if path.is_dir() else SentencePieceSpans(read_model(path))


def read_model(path: Path) -> ModelProto:
    """A SentencePiece model. Errors: PostTrainingError for a file that is none."""
    try:
        model = ModelProto.FromString(path.read_bytes())
    except DecodeError:
        model = ModelProto()
    if not model.pieces:
        raise PostTrainingError("not a SentencePiece model", where=str(path))
    return model


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a Hugging Face tokenizer's folder.

    Errors: UsageError when there is none; PostTrainingError for a file that is none.
    """
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("no such file in the tokenizer's folder", where=str(path)) from None
    except Exception as error:  # of the tokenizers library: Exception itself
        raise PostTrainingError(f"not a tokenizer: {error}", where=str(path)) from None


class SentencePieceSpans:
    """The spans of a SentencePiece model."""

    def __init__(self, model: ModelProto):
        self._processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        self.vocab_size = len(model.pieces)
        self.control_ids = _ids_of_types(model, Piece.CONTROL, Piece.USER_DEFINED)
        self.special_ids = _ids_of_types(model, Piece.CONTROL)

    def encode(self, spans: list[str]) -> list[list[int]]:
        return self._processor.encode(spans, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def piece_of(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def id_of(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        # Of an unknown piece it gives the id of <unk>, which is often 0.
        return token if self._processor.id_to_piece(token) == piece else None


class HuggingFaceSpans:
    """The spans of a tokenizer.json."""

    def __init__(self, folder: Path):
        self._tokenizer = read_tokenizer(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.control_ids = frozenset(added)
        self.special_ids = frozenset(key for key, token in added.items() if token.special)

    def encode(self, spans: list[str]) -> list[list[int]]:
        encoded = self._tokenizer.encode_batch_fast(spans, add_special_tokens=False)
        return [each.ids for each in encoded]

    def piece_of(self, token: int) -> str:
        return self._tokenizer.id_to_token(token)

    def id_of(self, piece: str) -> int | None:
        return self._tokenizer.token_to_id(piece)


def _ids_of_types(model: ModelProto, *types: int) -> frozenset[int]:
    return frozenset(key for key, piece in enumerate(model.pieces) if piece.type in types)


@dataclass(frozen=True)
class EncodedDocuments:
    """Documents one after another. lengths: of each document, in tokens."""

    tokens: Int32[np.ndarray, " T"]
    kinds: UInt8[np.ndarray, " T"]
    lengths: Int64[np.ndarray, " documents"]

    def first(self, number: int | None) -> "EncodedDocuments":
        """At most this many of the documents; None: all."""
        lengths = self.lengths[:number]
        num_tokens = int(lengths.sum())
        return EncodedDocuments(self.tokens[:num_tokens], self.kinds[:num_tokens], lengths)


class DocumentEncoder:
    """Encodes documents. eod: written once at the end of each; None: nothing is."""

    def __init__(self, tokenizer: SpanTokenizer, user: int, assistant: int, eod: str | None):
        """Errors: UsageError for control tokens that the tokenizer doesn't have."""
        self._tokenizer = tokenizer
        self._user = control_token(tokenizer, "control_tokens.user", user)
        self._assistant = control_token(tokenizer, "control_tokens.assistant", assistant)
        if user == assistant:
            raise UsageError(f"must differ (both are {user})", where="control_tokens")
        self._end: list[int] = [] if eod is None else [end_of_document(tokenizer, eod)]
        self._forbidden = tokenizer.special_ids | {user, assistant, *self._end}

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def describe(self) -> str:
        """`user 7 <|user|>, assistant 8 <|assistant|>, end of document 3 <|endoftext|>`."""
        tokens = [("user", self._user), ("assistant", self._assistant)]
        tokens += [("end of document", end) for end in self._end]
        return ", ".join(f"{name} {id_} {self._tokenizer.piece_of(id_)}" for name, id_ in tokens)

    def encode(self, documents: list[list[str]]) -> list[list[list[int]] | BadRow]:
        """The ids of each turn of each document (as `turns_of` gives them), or why not."""
        encoded = iter(self._tokenizer.encode([turn for turns in documents for turn in turns]))
        results: list[list[list[int]] | BadRow] = []
        for turns in documents:
            ids = [next(encoded) for _ in turns]
            results.append(self._fault(ids) or ids)
        return results

    def join(self, documents: Iterable[list[list[int]]]) -> EncodedDocuments:
        """Control tokens around the turns of each document, and what the loss makes of each."""
        user, assistant = self._user, self._assistant
        tokens: list[int] = []
        kinds = bytearray()
        lengths: list[int] = []
        for turns in documents:
            start = len(tokens)
            for asked, answered in zip(turns[::2], turns[1::2], strict=True):
                tokens += (user, *asked, user, assistant)
                kinds += bytes([PROMPT]) * (len(asked) + 3)
                tokens += (*answered, assistant)
                kinds += bytes([COMPLETION]) * (len(answered) + 1)
            tokens += self._end
            kinds += bytes([COMPLETION]) * len(self._end)
            lengths.append(len(tokens) - start)
        return EncodedDocuments(
            np.array(tokens, np.int32),
            np.frombuffer(bytes(kinds), np.uint8),
            np.array(lengths, np.int64),
        )

    def _fault(self, turns: list[list[int]]) -> BadRow | None:
        for number, ids in enumerate(turns, start=1):
            if not ids:
                return BadRow("empty", f"turn {number} holds no character of the tokenizer's")
            if not self._forbidden.isdisjoint(ids):
                token = next(token for token in ids if token in self._forbidden)
                piece = self._tokenizer.piece_of(token)
                problem = f"turn {number} spells out {piece}, which becomes control token {token}"
                return BadRow("control-token", problem)
        return None


def turns_of(text: str) -> list[str]:
    """What the user and the assistant wrote, in turns. Errors: BadRow, naming the first fault."""
    turns: list[str] = []
    markers = list(_MARKER.finditer(text))
    position = 0
    for opening, closing in zip(markers[::2], [*markers[1::2], None], strict=False):
        _check_outside(text, position, opening.start())
        role, number = ROLES[len(turns) % 2], len(turns) + 1
        if opening[1] != role:
            raise BadRow("markers", f"turn {number} is the {opening[1]}'s, must be the {role}'s")
        if closing is None or closing[1] != role:
            where = f"at character {opening.start() + 1}"
            raise BadRow("markers", f"turn {number}: {opening[0]} {where} is not closed")
        turn = text[opening.end() : closing.start()]
        if not turn.strip():
            raise BadRow("empty", f"turn {number}: the {role} says nothing")
        turns.append(turn)
        position = closing.end()
    _check_outside(text, position, len(text))
    if not turns:
        raise BadRow("empty", "the text is empty")
    if len(turns) % 2:
        raise BadRow("markers", f"ends after turn {len(turns)}, the user's")
    return turns


def spans_between_markers(text: str) -> list[str]:
    """What stands before, between and after markers, whether they pair up or not."""
    return [span for span in _MARKER.split(text)[::2] if span]


def _check_outside(text: str, start: int, end: int) -> None:
    if start < end:
        what = shown(text[start:end], limit=30)
        raise BadRow("markers", f"text outside the markers at character {start + 1}: {what}")


def control_token(tokenizer: SpanTokenizer, key: str, token: int) -> int:
    """The token that the setting `key` names.

    Errors: UsageError where it can't be a control token.
    """
    if token >= tokenizer.vocab_size:
        raise UsageError(
            f"must be < {tokenizer.vocab_size}, the vocabulary (got {token})", where=key
        )
    if token not in tokenizer.control_ids:
        raise UsageError(
            f"{token} is {tokenizer.piece_of(token)!r}, an ordinary piece that texts are made of",
            where=key,
            hint="name the id of a control or user-defined piece, or of an added token",
        )
    return token


def end_of_document(tokenizer: SpanTokenizer, piece: str) -> int:
    """The id of the piece that ends a document. Errors: UsageError, as of control_token."""
    token = tokenizer.id_of(piece)
    if token is None:
        raise UsageError(
            f"{piece!r} is not in the tokenizer's vocabulary",
            where="eod",
            hint="name the piece that ends a document, or set append_eod: false",
        )
    return control_token(tokenizer, "eod", token)
