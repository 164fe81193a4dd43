"""The row types: what every format is read into, and everything after works on.

    file -> Record (a place, and a JSON object or a fault) -> Row -> sequence of tokens

A row that can't be used is raised as BadRow, with one of the REASONS; Verdicts (reading.py) decide
what becomes of it. Rows travel between processes: everything here is small and picklable.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "developer", "user", "assistant", "tool"]

# What the loss makes of a token. Only a loss that weighs prompts looks at PROMPT tokens; EXCLUDED
# ones (a thought that is not to be learned, a message of weight 0) are never more than context.
PROMPT, COMPLETION, EXCLUDED = 0, 1, 2
# The two answers of a preference row, by the columns that hold them.
SIDES = ("chosen", "rejected")

REASONS = {
    "malformed": "not one JSON object in UTF-8, with each key once",
    "columns": "a column is missing or of the wrong type",
    "empty": "nothing in a prompt, an answer or a text",
    "roles": "an unknown role, or roles that don't alternate",
    "control-token": "the content holds a token that only the template may write",
    "markers": "control markers that don't pair up, or text outside them",
    "tool-call": "an output without a call, or a call that can't be rendered",
    "transform": "the transform raised an error",
    "filtered": "the transform, or a filter, left it out",
    "too-long": "longer than the limit, with overlong: drop or fail",
    "truncated": "an answer that is cut off, with truncated_completions: drop",
    "untrained": "no token to train on within the limit",
    "duplicate": "the same tokens, or the same prompt, as an earlier row",
    "near-duplicate": "nearly the same words as an earlier row, with deduplicate: near",
    "contaminated": "so many words in a row as a benchmark has them, with decontaminate",
    "failed": "the stage failed at it, and at it alone",
}


class BadRow(Exception):
    """Why a row can't be used.

    reason: a key of REASONS. problem: one line, lower case. hint: how such rows can be used after
    all, where a setting decides.
    """

    def __init__(self, reason: str, problem: str, hint: str | None = None):
        super().__init__(reason, problem, hint)
        self.reason = reason
        self.problem = problem
        self.hint = hint


@dataclass(frozen=True)
class Place:
    """Where a row stands. number: line of a JSONL file, else row, from 1. byte: offset of the
    line's first byte, where the file has lines."""

    path: str
    number: int
    byte: int | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


@dataclass(frozen=True)
class Record:
    """A row as it stands in its file.

    value: the JSON object, or why there is none. raw: its bytes, for the rejects file. transformed:
    what the dataset's transform made of the value, where it was called already.
    """

    place: Place
    value: dict[str, Any] | BadRow
    raw: bytes
    transformed: "list[dict[str, Any]] | BadRow | None" = None


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. arguments: JSON text. id: where the row has one; by it an output names its
    call."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn, or one part of an assistant's turn: what it thought, then said or called.

    kind: PROMPT, COMPLETION or EXCLUDED, of what the assistant wrote (other roles are PROMPT).
    weight: of its tokens in the loss, where the kind is COMPLETION.
    tool_call_id, name: of a tool's output, where its row has them: the call's id, and whose it is.
    An assistant's messages and the tool messages between them make up one turn.
    """

    role: Role
    content: str
    kind: int = PROMPT
    weight: float = 1.0
    thought: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages of one conversation. tools: JSON text of each tool, as a server is sent it
    (formats/tools.py)."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class Text:
    """A document without turns; every token of it is COMPLETION."""

    text: str


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    prompt: ends before the answers. chosen, rejected: messages of the assistant's turn(s). figures:
    what stands beside them (reference logprobs, rewards, token ids, …), by column: numbers, lists
    of numbers, and whether an answer is_truncated.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)


Row = Conversation | Text | Preference
