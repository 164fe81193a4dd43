"""From rows to what is shown of them in a terminal."""

import io
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.indexed import IndexedWriter
from post_training.data.inspection.samples import Part, Run, Sample, read_samples, show
from post_training.data.inspection.tokens import (
    Spelled,
    Vocabulary,
    stretches_of_run,
    stretches_of_token,
)
from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT

TEXT = "Some merges,  an é, 🙂 and 日本\n\tend "
KINDS_OF_TOKENIZER = (
    *("byte-level", "byte-level, own split, bos", "byte-level, NFC", "byte-level, prefix space"),
    *("metaspace first", "metaspace always", "sentencepiece, normaliser"),
)


def spelled(*contents: bytes | str) -> tuple[Spelled, ...]:
    """Tokens 0, 1, …; a text stands for a special token."""
    return tuple(
        Spelled(token, content.encode() if isinstance(content, str) else content, is_special)
        for token, content in enumerate(contents)
        for is_special in [isinstance(content, str)]
    )


def run_text(*contents: bytes | str) -> str:
    return "".join(stretch.text for stretch in stretches_of_run(spelled(*contents)))


def token_text(content: bytes) -> str:
    return "".join(stretch.text for stretch in stretches_of_token(Spelled(0, content, False)))


@pytest.mark.parametrize("kind", KINDS_OF_TOKENIZER)
def test_vocabulary_tokens_spell_the_text(kind: str, tokenizers: dict[str, Any]):
    backend = tokenizers[kind].backend_tokenizer
    vocabulary = Vocabulary.of_tokenizer(backend)
    ids = backend.encode(f"<|im_start|>{TEXT}", add_special_tokens=False).ids
    marker, *tokens = vocabulary.spell(ids)
    assert (marker.content, marker.is_special) == (b"<|im_start|>", True)
    assert not any(token.is_special for token in tokens)
    # Some tokenizers put a space before each text.
    assert b"".join(token.content for token in tokens).decode().removeprefix(" ") == TEXT


@given(text=st.text())
def test_vocabulary_byte_level_tokens_spell_any_text(text: str):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({each: number for number, each in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = Vocabulary.of_tokenizer(backend).spell(backend.encode(text).ids)
    assert b"".join(token.content for token in tokens) == text.encode()


def test_vocabulary_sentencepiece_markers_are_special_and_line_breaks_text(tmp_path: Path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some merges and more", "merges, some more"] * 20),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|user|>", "\n"],
        hard_vocab_limit=False,
        minloglevel=3,
    )
    path = tmp_path / "spm.model"
    path.write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = [1, *processor.encode("<|user|>some 日\nmore")]
    tokens = Vocabulary.load(path).spell(ids)
    assert [token.content for token in tokens if token.is_special] == [b"<s>", b"<|user|>"]
    text = b"".join(token.content for token in tokens if not token.is_special)
    assert text.decode().strip() == "some 日\nmore"


def test_vocabulary_id_that_is_not_there_is_refused(tokenizers: dict[str, Any]):
    vocabulary = Vocabulary.of_tokenizer(tokenizers["byte-level"].backend_tokenizer)
    with pytest.raises(UsageError, match="token 70000 is not in the tokenizer's vocabulary"):
        vocabulary.spell([1, 70000])


@pytest.mark.parametrize("content", [None, "{}"])
def test_vocabulary_folder_without_a_tokenizer_is_refused(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(PostTrainingError, match=r"tokenizer\.json: (no such file|not a tokenizer)"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ((b"a b",), "a b"),
        ((b"a  b ",), "a··b·"),
        ((b"a\n b\r\n\tc",), "a↵\n·b␍↵\n⇥c"),
        ((b"\xe6\x97", b"\xa5"), "日"),  # a character of two tokens
        ((b"a\xe2\x96", "<|end|>", b"\x88b"), "a⟨e2 96⟩<|end|>⟨88⟩b"),
        ((b"\xff\xfea",), "⟨ff fe⟩a"),
        (("\u200b\u202e\u00a0".encode(),), "⟨U+200B⟩⟨U+202E⟩⟨U+00A0⟩"),
        (("👩\u200d👩".encode(),), "👩\u200d👩"),
        ((b"\x1b[2J", "<\x1b[2J>"), "⟨U+001B⟩[2J<⟨U+001B⟩[2J>"),
    ],
)
def test_visible_text_of_a_run(contents: tuple[bytes | str, ...], expected: str):
    assert run_text(*contents) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b" a b", "·a·b"), (b"\n\n", "↵↵"), (b"\xe2\x96", "⟨e2 96⟩"), ("é".encode(), "é")],
)
def test_visible_text_of_a_token(content: bytes, expected: str):
    assert token_text(content) == expected


@given(content=st.binary() | st.text().map(str.encode))
def test_visible_text_holds_nothing_that_steers_a_terminal(content: bytes):
    shown = run_text(content) + token_text(content)
    controls = {char for char in shown if unicodedata.category(char) in ("Cc", "Cf", "Cs")}
    assert controls <= {"\n", "\u200c", "\u200d"}


def characters() -> Vocabulary:
    """Token n is the character n."""
    return Vocabulary(chr, str.encode, {})


@pytest.fixture
def packed(tmp_path: Path) -> PreparedDataset:
    """Sources "a" (abcdef, gh) and "b" (ijk). Row 1: gh and ijk; row 2: cdef of abcdef."""
    texts = ["abcdef", "gh", "ijk"]
    kinds = [0, 0, 1, 1, 2, 0, *(0, 1), *(1, 1, 1)]
    weights = np.array([1, 1, 1, 0.5, 0.5, 1, 1, 1, 1, 1, 2], "<f4")
    with IndexedWriter(tmp_path / "tokens", np.uint16) as tokens:
        tokens.append(np.frombuffer("".join(texts).encode(), np.uint8), np.array([6, 2, 3]))
    with IndexedWriter(tmp_path / "kinds", np.uint8) as written:
        written.append(np.array(kinds, np.uint8), np.array([6, 2, 3]))
    (tmp_path / "weights.f32").write_bytes(weights.tobytes())
    store = SequenceStore(tmp_path / "tokens", tmp_path / "kinds", tmp_path / "weights.f32")
    record = {"sources": [{"name": "a", "num_rows": 2}, {"name": "b", "num_rows": 1}]}
    pieces = np.array([[1, 0, 2], [2, 0, 3], [0, 2, 4]])
    return PreparedDataset([store], np.array([0, 2, 3]), pieces, record)


def runs_of(part: Part) -> list[tuple[int, float, str]]:
    return [
        (run.kind, run.weight, b"".join(token.content for token in run.tokens).decode())
        for run in part.runs
    ]


def test_samples_of_a_packed_row_are_its_sequences(packed: PreparedDataset):
    first, second = read_samples(packed, characters(), range(2))
    gh, ijk = first.parts
    assert runs_of(gh) == [(PROMPT, 1.0, "g"), (COMPLETION, 1.0, "h")]
    # The first token of a sequence is never trained.
    assert runs_of(ijk) == [(PROMPT, 1.0, "i"), (COMPLETION, 1.0, "j"), (COMPLETION, 2.0, "k")]
    assert first.describe() == "row 1: 2 sequences: 5 tokens, 3 trained"
    assert gh.describe() == "sequence 2 of a: 2 tokens, 1 trained"
    assert ijk.describe() == "sequence 1 of b: 3 tokens, 2 trained"
    [cdef] = second.parts
    # Weights are of trained tokens only.
    assert runs_of(cdef) == [
        (PROMPT, 1.0, "c"),
        (COMPLETION, 0.5, "d"),
        (EXCLUDED, 1.0, "e"),
        (PROMPT, 1.0, "f"),
    ]
    assert cdef.describe() == "sequence 1 of a: 4 tokens, 1 trained (tokens 3 to 6 of 6)"


def terminal(sample: Sample, **settings: Any) -> str:
    console = Console(file=io.StringIO(), width=40, **settings)
    show([sample], console)
    return console.file.getvalue()


@pytest.fixture
def sample() -> Sample:
    runs = (
        Run(PROMPT, 1.0, spelled("<|user|>", b"two words", b" [bold]x")),
        Run(COMPLETION, 0.5, spelled(b"an", b" answer" * 12)),
        Run(EXCLUDED, 1.0, spelled(b"\x1b[31m", b"\n")),
    )
    return Sample(7, (Part("x", 3, 0, 7, runs),))


def test_terminal_without_colour_marks_what_is_trained(sample: Sample):
    lines = terminal(sample).splitlines()
    assert lines[0] == "⟦trained⟧  context  ⟪excluded from the loss⟫  "
    assert lines[2:4] == [
        "━━ row 7: 7 tokens, 2 trained",
        "── sequence 3 of x: 7 tokens, 2 trained",
    ]
    answer = " answer" * 12
    assert lines[4] == f"<|user|>two words [bold]x⟦×0.5 an{answer}⟧⟪⟨U+001B⟩[31m↵"
    shown = answer.replace(" ", "·")
    assert lines[6] == f"<|user|>│two·words│·[bold]x│⟦×0.5 an│{shown}│⟧⟪⟨U+001B⟩[31m│↵│⟫"
    assert lines[7] == "0 1 2 ⟦×0.5 0 1 ⟧⟪0 1 ⟫"


def test_terminal_no_color_is_the_same_as_none(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert terminal(sample, force_terminal=True) == terminal(sample)


def test_terminal_with_colour_has_no_brackets(sample: Sample, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = terminal(sample, force_terminal=True, color_system="standard")
    assert "⟦" not in shown
    assert "\x1b[32man" in shown
    # A colour of ours, never one of the data's.
    assert "\x1b[31m" not in shown
