"""Tokenizers of spans: stretches of text between control tokens, each encoded on its own.

So a SentencePiece model gives every span a dummy prefix (▁). The control tokens around the spans
are written by id (control_tokens.py). Both kinds can be sent to another process.
"""

from pathlib import Path
from typing import Protocol

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError, UsageError

Piece = ModelProto.SentencePiece


class SpanTokenizer(Protocol):
    """vocab_size: every id is below it. control_ids: may serve as control tokens, because no word
    is made of them. special_ids: those of them that a text must not spell out."""

    vocab_size: int
    control_ids: frozenset[int]
    special_ids: frozenset[int]

    def encode(self, spans: list[str]) -> list[list[int]]: ...

    def piece_of(self, token: int) -> str: ...

    def id_of(self, piece: str) -> int | None: ...


def load_span_tokenizer(path: Path) -> SpanTokenizer:
    """path: a SentencePiece model, or a folder with a Hugging Face tokenizer.json.

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
