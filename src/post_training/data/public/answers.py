"""Public datasets of questions, answers and preferences: their rows in a form that is recognised.

Each function takes a row's JSON object and returns the rows it becomes; columns that it does not
name stay as they are. Errors: BadRow.
"""

import re
from typing import Any

from post_training.data.formats.values import (
    filled_text,
    list_of,
    object_of,
    required,
    text,
    without,
    wrong_type,
)
from post_training.data.rows import SIDES, BadRow

Object = dict[str, Any]

_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
# A transcript begins with a speaker; elsewhere one follows an empty line.
_SPEAKER = re.compile(rf"(?:\A\s*|\n\n)({'|'.join(_SPEAKERS)}):")


def hh_rlhf(row: Object) -> list[Object]:
    """chosen and rejected as transcripts: `\\n\\nHuman: …\\n\\nAssistant: …`, to messages."""
    return [{**row, **{side: _turns(required(row, side), side) for side in SIDES}}]


def _turns(transcript: Any, key: str) -> list[Object]:
    before, *parts = _SPEAKER.split(filled_text(transcript, key))
    if before.strip() or not parts:
        raise BadRow("columns", f"{key}: must begin with one of {', '.join(_SPEAKERS)} and a colon")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in turns]


def sharegpt_preference(row: Object) -> list[Object]:
    """conversations, and one more message or its text as chosen and rejected, to prompt and
    answers."""
    others = without(row, "conversations", *SIDES)
    if "prompt" in others:
        raise BadRow("columns", "prompt: has no place beside conversations")
    answers = {side: required(row, side) for side in SIDES}
    for side, answer in answers.items():
        if isinstance(answer, str):
            answer = {"from": "gpt", "value": answer}
        if isinstance(answer, dict):
            answers[side] = [answer]
    prompt = list_of(required(row, "conversations"), "conversations")
    return [{**others, "prompt": prompt, **answers}]


def kto(row: Object) -> list[Object]:
    """An answer with a label, to the answer alone where it is true, else to nothing."""
    label = required(row, "label")
    if not isinstance(label, bool):
        raise wrong_type("label", "true or false", label)
    return [without(row, "label")] if label else []


def squad(row: Object) -> list[Object]:
    """context and question, to a prompt; the first of the answers, to its completion. A question
    without an answer becomes nothing."""
    context = filled_text(required(row, "context"), "context")
    question = filled_text(required(row, "question"), "question")
    if "answers" in row:
        answers = object_of(row["answers"], "answers")
        texts = list_of(required(answers, "text", "answers"), "answers.text")
    else:
        texts = [required(row, "answer")]
    if not texts:
        return []
    others = without(row, "context", "question", "answer")
    completion = text(texts[0], "answers.text[0]" if "answers" in row else "answer")
    return [{**others, "prompt": f"{context}\n\n{question}", "completion": completion}]
