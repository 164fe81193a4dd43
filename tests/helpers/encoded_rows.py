"""Rows in a few words, encoded."""

from typing import Any

from post_training.data.chat.templates import choose_template
from post_training.data.rows import COMPLETION, BadRow, Conversation, Message
from post_training.data.tokenize import Encoder, TokenSequence


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str, kind: int = COMPLETION, **rest: Any) -> Message:
    return Message("assistant", content, kind, **rest)


def encoder(tokenizer: Any, name: str = "chatml", control_tokens: str = "refuse") -> Encoder:
    return Encoder.create(
        tokenizer, choose_template(name, tokenizer), control_tokens=control_tokens
    )


def encode(
    tokenizer: Any, *messages: Message, name: str = "chatml", tools: tuple[str, ...] = ()
) -> TokenSequence | BadRow:
    [result] = encoder(tokenizer, name).encode([Conversation(messages, tools)])
    return result


def reason(result: TokenSequence | BadRow) -> str:
    assert isinstance(result, BadRow)
    return f"{result.reason}: {result.problem}"


def of_kind(sequence: TokenSequence, kind: int, tokenizer: Any) -> str:
    """The text of the tokens of this kind, `·` for a run of others."""
    text = ""
    for token, own in zip(sequence.ids, sequence.kinds, strict=True):
        if own == kind:
            text += tokenizer.decode([token])
        elif not text.endswith("·"):
            text += "·"
    return text
