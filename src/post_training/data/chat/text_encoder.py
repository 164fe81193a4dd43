"""Conversations as the ids of their whole text, by a template that need not mark anything.

For a model that judges what was written, such as a reward model, and reads it by its own template.
A template that was made for messages of another structure drops contents, or writes the structure
itself (`{'role': …}`): the one is refused row by row, the other before any row is read.
"""

import json
from typing import Any

from tokenizers import Tokenizer

from post_training.core.errors import PostTrainingError
from post_training.data.chat.proof import PROBE, RENDERING_FAILURES
from post_training.data.chat.rendering import MessageDicts, message_dicts, render
from post_training.data.chat.templates import template_text
from post_training.data.rows import BadRow, Conversation

_KEYS = ("role", "content")


class TextEncoder:
    def __init__(self, tokenizer: Any, template: str):
        """template: the name of one of ours, or `model`: the tokenizer's own.

        Errors: PostTrainingError when there is none, or it writes a date or no messages.
        """
        self._where = f"chat template {template!r}"
        own = tokenizer.chat_template if template == "model" else template_text(template)
        if not isinstance(own, str):
            raise PostTrainingError("the tokenizer has no chat template", where=self._where)
        if "strftime_now" in own:
            raise PostTrainingError(
                "it writes today's date, so a judgement would differ by day", where=self._where
            )
        self._template = own
        self._special_tokens = dict(tokenizer.special_tokens_map)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # The template writes what stands at a text's ends.
        state["truncation"] = state["padding"] = state["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._probe()

    def encode(self, conversation: Conversation) -> list[int]:
        """Errors: BadRow for what the template can't express."""
        dicts = message_dicts(conversation)
        text = self._text(dicts)
        for said in _contents(dicts):
            if said.strip() not in text:
                problem = f"{self._where} leaves out a part: {said[:40]!r}"
                raise BadRow("tool-call" if "calls" in dicts.needs else "roles", problem)
        return self._backend.encode(text, add_special_tokens=False).ids

    def _text(self, dicts: MessageDicts) -> str:
        try:
            text, _ = render(self._template, dicts, self._special_tokens)
        except RENDERING_FAILURES as error:
            raise BadRow("roles", f"{self._where}: {error}") from None
        return text

    def _probe(self) -> None:
        dicts = message_dicts(PROBE)
        try:
            text = self._text(dicts)
        except BadRow as bad:
            raise PostTrainingError(
                f"it can't be rendered: {bad.problem}", where=self._where
            ) from None
        if missing := [said for said in _contents(dicts) if said not in text]:
            raise PostTrainingError(
                f"it leaves out {missing[0]!r}: it was made for messages of another structure",
                where=self._where,
            )
        if written := [key for key in _KEYS if f"'{key}':" in text or f'"{key}":' in text]:
            raise PostTrainingError(
                f"it writes the messages' structure ({written[0]!r}), not what they say",
                where=self._where,
            )


def _contents(dicts: MessageDicts) -> list[str]:
    """Words of a row that its text must have."""
    said = []
    for message in dicts.messages:
        said += [message["content"], message.get("reasoning_content", "")]
        said += [call["function"]["name"] for call in message.get("tool_calls", ())]
    # Some wrap a function as OpenAI does.
    said += [tool.get("function", tool).get("name", "") for tool in dicts.tools]
    return said
