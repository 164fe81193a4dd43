"""Conversations to token ids and labels.

The labels are the ids on the tokens to be trained, and -100 on all others; a model predicts token
t from those before it, so the label at position 0 counts for nothing. A token is trained when any
of its characters lies in a trained turn, as in `apply_chat_template`'s own mask. A sequence longer
than the limit loses its end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.data.chat_templates import PROBE, ChatTemplate, Spans, render
from post_training.data.conversations import Conversation, Message

IGNORED = -100
_BATCH_SIZE = 1000


@dataclass(frozen=True)
class TokenizedRow:
    input_ids: list[int]
    labels: list[int]
    truncated: bool

    @property
    def num_trained_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


def tokenize(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    template: ChatTemplate,
    max_seq_length: int,
) -> Iterator[TokenizedRow]:
    """One row for each conversation, in order. `tokenizer` must be a fast one (it has offsets).

    Errors: PostTrainingError naming the line of a conversation that would train nothing; or when
    the tokenizer's offsets don't lead back to the text.
    """
    _prove_offsets(tokenizer, template)
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH_SIZE)):
        rendered = render([_as_dicts(item) for item in batch], template.text, tokenizer)
        encoded = tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,  # the template writes them
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,  # "longer than the maximum": the limit here is ours
        )
        for conversation, (_, spans), ids, offsets in zip(
            batch, rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            trained = _trained_spans(conversation, spans, template)
            yield _row(conversation, ids, offsets, trained, max_seq_length)


def _as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": item.role, "content": item.content} for item in conversation.messages]


def _trained_spans(conversation: Conversation, spans: Spans, template: ChatTemplate) -> Spans:
    """The spans of the turns to be trained: the template marks all of the assistant's."""
    turns = [message for message in conversation.messages if message.role == "assistant"]
    if len(turns) != len(spans):
        raise PostTrainingError(
            f"chat template {template.name!r} marks {len(spans)} of {len(turns)} assistant turns",
            where=conversation.where,
        )
    return [span for turn, span in zip(turns, spans, strict=True) if turn.trained]


def _prove_offsets(tokenizer: Any, template: ChatTemplate) -> None:
    """Try the mask on the template's probe: the trained tokens must spell the trained turns."""
    probe = Conversation(
        tuple(Message(role, text, role == "assistant") for role, text in PROBE), "probe"
    )
    [(text, spans)] = render([_as_dicts(probe)], template.text, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    row = _row(probe, ids, encoded["offset_mapping"], spans, len(ids))
    trained = [label for label in row.labels if label != IGNORED]
    expected = "".join(text[start:end] for start, end in spans)
    # Tokenizers differ in the spaces they put back between words.
    if _letters(tokenizer.decode(trained)) != _letters(expected):
        raise PostTrainingError(
            f"the tokenizer's offsets don't mark the trained turns: {tokenizer.decode(trained)!r} "
            f"instead of {expected!r}",
            where=f"chat template {template.name!r}",
        )


def _letters(text: str) -> str:
    return "".join(text.split())


def _row(
    conversation: Conversation,
    ids: list[int],
    offsets: list[tuple[int, int]],
    trained: Spans,
    max_seq_length: int,
) -> TokenizedRow:
    labels = [IGNORED] * len(ids)
    spans = iter(trained)
    span = next(spans, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        if span is None:
            break
        if end > span[0]:
            labels[index] = ids[index]
    row = TokenizedRow(ids[:max_seq_length], labels[:max_seq_length], len(ids) > max_seq_length)
    if row.num_trained_tokens == 0:
        raise PostTrainingError(
            f"nothing to train on in the first {max_seq_length} of {len(ids)} tokens",
            where=conversation.where,
            hint="raise sft.max_seq_length, or leave the row out",
        )
    return row
