"""Nothing that changes what is said or trained is left out of a row in silence."""

from collections import Counter
from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.formats.unread import OF_A_MESSAGE, OF_THE_ANSWER, OF_THE_PROMPT
from post_training.data.rows import BadRow, Conversation, Message

USER = {"role": "user", "content": "Name a lake."}
ASSISTANT = {"role": "assistant", "content": "Lac Léman."}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"question": "Name a lake.", "answer": "Lake Thun."}


def looked_over(row: dict[str, Any], *, for_training: bool = True, **settings: Any) -> Counter[str]:
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
    filled: Counter[str] = Counter()
    found.check_columns(row, filled, for_training=for_training)
    return filled


def conversation_of(row: dict[str, Any], **settings: Any) -> Conversation:
    looked_over(row, **settings)
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    return conversation


def asked(row: dict[str, Any], **settings: Any) -> list[str]:
    messages = conversation_of(row, **settings).messages
    return [message.content for message in messages if message.role in ("system", "user")]


def refusal(row: dict[str, Any], **settings: Any) -> tuple[str, str]:
    with pytest.raises(BadRow) as bad:
        looked_over(row, **settings)
    assert bad.value.reason == "columns"
    return bad.value.problem, str(bad.value.hint)


@pytest.mark.parametrize("name", sorted(OF_THE_PROMPT | OF_THE_ANSWER))
def test_column_that_changes_the_row_is_read_or_refused_or_ignored_on_purpose(name: str):
    row = {**CHAT, name: ["x"]}
    if name in ("system", "system_prompt", "tools", "functions"):
        assert looked_over(row)[name] == 1
        return
    problem, hint = refusal(row)
    assert problem == f"column {name} is not read, and it changes what is said or trained"
    assert f"ignore: [{name}]" in hint
    assert looked_over(row, ignore=[name]) == {"messages": 1, name: 1}
    assert looked_over({**CHAT, name: None}) == {"messages": 1}


@pytest.mark.parametrize("name", sorted(OF_A_MESSAGE))
def test_field_that_changes_a_message_is_read_or_refused_or_ignored_on_purpose(name: str):
    row = {"messages": [USER, {**ASSISTANT, name: ["x"]}]}
    path = f"messages[].{name}"
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    if found.reads(path):
        assert looked_over(row)[path] == 1
        return
    problem, hint = refusal(row)
    assert problem.startswith(f"messages[1].{name} is not read")
    assert f'ignore: ["{path}"]' in hint
    assert looked_over(row, ignore=[path]) == {"messages": 1, path: 1}


def test_other_columns_and_fields_are_counted():
    row = {
        "messages": [{**USER, "id": 1, "name": "Ann", "tool_calls": None}, {**ASSISTANT, "id": 2}],
        "source": "toy",
        "split": 0,
        "score": None,
    }
    assert looked_over(row) == {
        "messages": 1,
        "messages[].id": 2,
        "messages[].name": 1,
        "source": 1,
        "split": 1,
    }


def test_unknown_parts_of_a_content_are_counted():
    developer = {"role": "developer", "content": {"tools": "[]", "has_thinking": True}}
    row = {"messages": [developer, USER, ASSISTANT]}
    assert looked_over(row)["messages[].content.has_thinking"] == 1


def test_column_that_is_both_named_and_ignored_is_refused():
    with pytest.raises(ValueError, match="columns, ignore: label is in both"):
        DatasetConfig(path="x", columns={"prompt": "a", "completion": "label"}, ignore=["label"])


def test_unknown_fields_of_a_call_are_counted():
    call = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    row = {"messages": [USER, {**ASSISTANT, "tool_calls": [call, call]}]}
    assert looked_over(row)["messages[].tool_calls[].index"] == 2


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"instruction": "Into German.", "input": "the lake", "response": "der See"},
            "Into German.\n\nthe lake",
        ),
        (
            {"instruction": "When?", "context": "From ten.", "response": "At ten."},
            "When?\n\nFrom ten.",
        ),
        ({"instruction": "When?", "context": "", "response": "At ten."}, "When?"),
        ({"instruction": "When?", "context": "At ten.", "output": "Ten."}, "When?\n\nAt ten."),
    ],
)
def test_input_of_an_instruction_is_part_of_the_prompt(row: dict[str, Any], prompt: str):
    assert asked(row) == [prompt]


def test_context_of_a_question_is_refused_until_the_settings_say_where_it_goes():
    row = {**PAIR, "context": "Lake Thun is a lake."}
    problem, hint = refusal(row)
    assert problem.startswith("column context is not read")
    mapping = "columns: {prompt: question, completion: answer, input: context}"
    assert mapping in hint
    columns = {"prompt": "question", "completion": "answer", "input": "context"}
    assert asked(row, columns=columns) == ["Name a lake.\n\nLake Thun is a lake."]
    assert asked(row, ignore=["context"]) == ["Name a lake."]


def test_input_beside_a_list_of_messages_is_refused():
    row = {"prompt": [USER], "completion": "Lake Thun.", "input": "x"}
    columns = {name: name for name in row}
    with pytest.raises(BadRow, match="input: has no place beside prompt, a list of messages"):
        conversation_of(row, columns=columns)


def test_named_columns_do_not_hide_others_that_change_the_row():
    columns = {"prompt": "question", "completion": "answer"}
    problem, hint = refusal({**PAIR, "system_prompt": "In French."}, columns=columns)
    assert problem.startswith("column system_prompt is not read")
    assert "columns: {prompt: question, completion: answer, system: system_prompt}" in hint


@pytest.mark.parametrize("label", [True, False, 0, 1])
def test_label_of_an_answer_is_never_trained_in_silence(label: Any):
    problem, hint = refusal({"prompt": "Name a lake.", "completion": "Buzz off.", "label": label})
    assert problem.startswith("column label is not read")
    assert "transform: kto" in hint


def test_settings_of_a_template_in_the_row_are_refused_where_they_say_something():
    settings = {"enable_thinking": False, "xml_tools": None}
    assert refusal({**CHAT, "chat_template_kwargs": settings})[0].startswith(
        "column chat_template_kwargs is not read"
    )
    empty = {"enable_thinking": None, "python_tools": []}
    assert looked_over({**CHAT, "chat_template_kwargs": empty}) == {"messages": 1}


def test_what_goes_with_an_answer_is_metadata_for_annotation():
    assert looked_over({**PAIR, "label": 3}, for_training=False)["label"] == 1
    with pytest.raises(BadRow, match="column context is not read"):
        looked_over({**PAIR, "context": "x"}, for_training=False)


def test_filled_one_of_two_names_is_read():
    told = {"system": None, "system_prompt": "In French.", "tools": None}
    conversation = conversation_of({**told, **CHAT, "functions": [{"name": "f"}]})
    assert conversation.messages[0] == Message("system", "In French.")
    assert len(conversation.tools) == 1
    same = {"system": "In French.", "system_prompt": "In French.", **CHAT}
    assert asked(same)[0] == "In French."


def test_two_names_that_say_different_things_are_refused():
    row = {"system": "In German.", "system_prompt": "In French.", **CHAT}
    with pytest.raises(BadRow) as bad:
        conversation_of(row)
    assert bad.value.problem == "system and system_prompt both say the system"
    assert asked(row, ignore=["system"])[0] == "In French."


def test_tools_of_a_column_and_of_the_messages_must_be_the_same():
    developer = {"role": "developer", "content": {"tools": [{"name": "f"}]}}
    row = {"messages": [developer, USER, ASSISTANT], "tools": [{"name": "f"}]}
    assert len(conversation_of(row).tools) == 1
    with pytest.raises(BadRow, match="the messages declare other tools"):
        conversation_of({**row, "tools": [{"name": "g"}]})


def test_ignored_fields_and_columns_are_not_read():
    row = {
        "messages": [USER, {**ASSISTANT, "reasoning": "Hm.", "weight": 0}],
        "tools": [{"name": "f"}],
        "system": "In French.",
    }
    ignore = ["messages[].reasoning", "messages[].weight", "tools", "system"]
    read = conversation_of(row, ignore=ignore)
    assert read == conversation_of(CHAT)


def test_figures_of_a_branch_are_no_fields_of_a_message():
    branch = {"messages": [ASSISTANT], "rewards": {"right": 1.0}, "loss": 0.5, "label": 1}
    row = {"initial_prompt": USER, "conversation_branches": [branch], "available_functions": []}
    assert looked_over(row) == {
        "initial_prompt": 1,
        "conversation_branches": 1,
        **{f"conversation_branches[].{name}": 1 for name in ("rewards", "loss", "label")},
    }


PART = {"type": "response", "content": "Lac Léman.", "metadata": {}, "name": "", "args": ""}


def branched(part: Any = PART, *, message: Any = None, branch: Any = None) -> dict[str, Any]:
    """A row of SwissAI's, with more fields in one of its parts, messages and branches."""
    turn = {"role": "assistant", "parts": [part], **(message or {})}
    return {
        "initial_prompt": {**USER, "metadata": {}},
        "conversation_branches": [{"messages": [turn], **(branch or {})}],
    }


@pytest.mark.parametrize(
    ("row", "path"),
    [
        (
            branched({**PART, "id": 7}),
            "conversation_branches[].messages[].parts[].id of a response",
        ),
        (branched({**PART, "score": 7}), "conversation_branches[].messages[].parts[].score"),
        (branched(message={"author": "x"}), "conversation_branches[].messages[].author"),
        (branched(branch={"metadata": {"a": 1}}), "conversation_branches[].metadata"),
        ({**branched(), "initial_prompt": {**USER, "topic": "x"}}, "initial_prompt.topic"),
        ({**branched(), "system_prompt": {"content": "x", "by": "y"}}, "system_prompt.by"),
        ({**branched(), "earlier_messages": [{**USER, "time": 1}]}, "earlier_messages[].time"),
    ],
)
def test_swissai_fields_that_nothing_reads_are_counted(row: dict[str, Any], path: str):
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    others = {name for name in looked_over(row) if name not in row}
    assert others == {path}
    assert found.reads(path) is None


@pytest.mark.parametrize(
    ("row", "key", "path"),
    [
        (
            branched({**PART, "weight": 0}),
            "conversation_branches[0].messages[0].parts[0].weight",
            "conversation_branches[].messages[].parts[].weight",
        ),
        (
            branched(message={"loss_mask": 0}),
            "conversation_branches[0].messages[0].loss_mask",
            "conversation_branches[].messages[].loss_mask",
        ),
        (
            branched(branch={"tools": [{"name": "f"}]}),
            "conversation_branches[0].tools",
            "conversation_branches[].tools",
        ),
        (
            {**branched(), "initial_prompt": {**USER, "images": ["x.png"]}},
            "initial_prompt.images",
            "initial_prompt.images",
        ),
    ],
)
def test_swissai_field_that_changes_what_is_trained_is_refused_or_ignored_on_purpose(
    row: dict[str, Any], key: str, path: str
):
    problem, hint = refusal(row)
    assert problem == f"{key} is not read, and it changes what is said or trained"
    assert f'ignore: ["{path}"]' in hint
    assert looked_over(row, ignore=[path])[path] == 1
    assert conversation_of(row, ignore=[path]) == conversation_of(branched())


def test_swissai_field_that_is_read_can_be_ignored():
    row = branched(branch={"is_reference_completion": True})
    with pytest.raises(BadRow, match="no branch that is not for reference"):
        conversation_of(row)
    ignored = ["conversation_branches[].is_reference_completion"]
    assert conversation_of(row, ignore=ignored) == conversation_of(branched())


def test_swissai_message_with_parts_and_a_content_is_refused():
    row = branched(message={"content": "Lake Thun."})
    problem, _ = refusal(row)
    assert problem.startswith("conversation_branches[0].messages[0].content is not read")
    path = "conversation_branches[].messages[].content"
    assert conversation_of(row, ignore=[path]) == conversation_of(branched())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("score", "messages[].content.blocks[].score"), ("weight", None)],
)
def test_fields_of_blocks_are_counted_or_refused(name: str, expected: str | None):
    block = {"type": "response", "text": "Lac Léman.", name: 0.5}
    row = {"messages": [USER, {"role": "assistant", "content": {"blocks": [block]}}]}
    if expected is None:
        problem, _ = refusal(row)
        assert problem.startswith("messages[1].content.blocks[0].weight is not read")
    else:
        assert looked_over(row)[expected] == 1
