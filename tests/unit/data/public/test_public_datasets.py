"""Rows of our own in the forms of public datasets, read with the settings that the list names.

Where a form was read (in November 2026):

- hermes: the rows in the dataset's card, README.md of NousResearch/hermes-function-calling-v1
- glaive: the format in the card of glaiveai/glaive-function-calling; white space, quotes and
  `<|endoftext|>` by two programs that read glaive-function-calling-v2
- xlam: rows of Salesforce/xlam-function-calling-60k that other programs quote; the types beyond
  `str`, `int`, `float`, `bool` and `List` by programs that convert all of them
- smoltalk2: the features in the card of HuggingFaceTB/smoltalk2 (SFT, Preference); what stands in
  xml_tools, and the tags in the texts, by the template of SmolLM3
- squad: the features in the card of rajpurkar/squad and the catalogue of TensorFlow
- dolly: instruction, context, response and category by programs that read it
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.config import FunctionLimits, SourcesConfig
from post_training.data.public.kinds import BUILT_IN_TRANSFORMS, KINDS
from post_training.data.reading import Reader, Rejected, open_sources
from post_training.data.rows import BadRow, Message, Preference, Row
from post_training.data.transforms import find_transform

ROWS = Path(__file__).parent / "rows"
ASKED, ANSWERED = "Name a lake.", "Lake Thun."


def read(name: str, path: Path | None = None) -> tuple[list[Row], list[Rejected]]:
    settings = yaml.safe_load(KINDS[name].settings) or {}
    path = path or ROWS / f"{name}.jsonl"
    config = SourcesConfig(datasets=[{"path": path, **settings}], on_error="skip")
    [source], formats = open_sources(config)
    reader, rejected = Reader(config, formats), []
    rows = [row for chunk in source.chunks() for _, row in reader.rows(chunk, 0, rejected)]
    return rows, rejected


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def calls(message: Message) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def transform(name: str, row: dict[str, Any]) -> Any:
    [made] = find_transform(name, [], FunctionLimits())([row], "row {}".format)
    return made


CHATS = {
    "alpaca": [
        [("user", "Name the lake.\n\nIt lies beside Thun."), ("assistant", ANSWERED)],
    ],
    "dolly": [
        [("user", "When does it close?\n\nThe shop closes at six."), ("assistant", "At six.")],
        [("user", ASKED), ("assistant", ANSWERED)],
    ],
    "openhermes": [
        [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4")],
        [("user", "3 + 3?"), ("assistant", "6")],
    ],
    "tulu_3": [
        [
            *[("user", ASKED), ("assistant", ANSWERED)],
            *[("user", "Another."), ("assistant", "Lake Biel.")],
        ],
    ],
    "kto": [[("user", ASKED), ("assistant", ANSWERED)]],
    "squad": [
        [("user", "Thun lies beside a lake.\n\nWhat lies beside it?"), ("assistant", "Thun")],
    ],
}
LEFT_OUT = {"kto": 1, "squad": 1}


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_read_as_they_are_meant(name: str):
    rows, rejected = read(name)
    assert [said(row.messages) for row in rows] == CHATS[name]
    assert [bad.bad.reason for bad in rejected] == ["filtered"] * LEFT_OUT.get(name, 0)


PREFERENCES = {
    "hh_rlhf": (
        [("user", ASKED), ("assistant", ANSWERED), ("user", "Why?\n\nIs it deep?")],
        ("It is.", "No idea."),
    ),
    "sharegpt_preference": ([("user", ASKED)], (ANSWERED, "No.")),
    "tulu_3_preference": ([("user", ASKED)], (ANSWERED, "No.")),
    "ultrafeedback": ([("user", f"{ASKED} ")], (ANSWERED, "No.")),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_have_one_prompt_and_two_answers(name: str):
    [row], rejected = read(name)
    prompt, answers = PREFERENCES[name]
    assert isinstance(row, Preference)
    assert rejected == []
    assert said(row.prompt) == prompt
    assert (row.chosen[0].content, row.rejected[0].content) == answers


def test_glaive_functions_are_tools_and_its_calls_are_calls():
    (chat, plain), rejected = read("glaive")
    assert rejected == []
    assert [json.loads(tool)["function"]["name"] for tool in chat.tools] == ["rain_today", "clock"]
    assert said(chat.messages) == [
        ("system", "You are a helpful assistant."),
        ("user", "Rain in Thun?"),
        ("assistant", ""),
        ("tool", '{"mm": 3}'),
        ("assistant", "It rained.\n\n3 mm fell."),
        ("user", "Thanks!"),
        ("assistant", "You're welcome!"),
    ]
    assert calls(chat.messages[2]) == [("rain_today", {"town": "Thun"})]
    assert plain.tools == ()
    assert plain.messages[0].content.endswith("with no access to external functions.")


def test_hermes_calls_and_outputs_of_one_turn_are_told_apart():
    [chat, _], rejected = read("hermes")
    assert rejected == []
    assert [json.loads(tool)["function"]["name"] for tool in chat.tools] == ["rain_today"]
    assert said(chat.messages) == [
        ("user", "Rain in Thun and Biel?"),
        ("assistant", "I look."),
        ("tool", '{"name": "rain_today", "content": {"mm": 3}}'),
        ("tool", '{"name": "rain_today", "content": {"mm": 0}}'),
        ("assistant", "3 mm in Thun."),
    ]
    assert calls(chat.messages[1]) == [
        ("rain_today", {"town": "Thun"}),
        ("rain_today", {"town": "Biel"}),
    ]


def test_hermes_extraction_keeps_what_its_instruction_says_beside_the_tools():
    _, chat = read("hermes")[0]
    assert chat.messages[0] == Message(
        "system",
        "You are an expert structured information extraction AI model. You will be provided with "
        "documents to extract information from.",
    )
    assert [json.loads(tool)["function"]["name"] for tool in chat.tools] == ["LakeExtractor"]
    assert calls(chat.messages[2]) == [("LakeExtractor", {"lakes": ["Lake Thun"]})]


def test_hermes_answers_in_json_keep_their_system_message(tmp_path: Path):
    """Its json_mode rows, which have no tools."""
    said = (
        "You are a helpful assistant that answers in JSON. <schema>\n{'title': 'Lake'}\n</schema>"
    )
    turns = [("system", said), ("human", "Name a lake."), ("gpt", '{"name": "Lake Thun"}')]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [chat], rejected = read("hermes", path)
    assert rejected == []
    assert chat.messages[0] == Message("system", said)
    assert chat.tools == ()


def test_xlam_types_are_those_of_json():
    [chat], _ = read("xlam")
    assert calls(chat.messages[1]) == [("rain_today", {"town": "Thun"})]
    [tool] = map(json.loads, chat.tools)
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "town": {"description": "Where.", "type": "string"},
            "days": {
                "description": "How many. Defaults to None.",
                "type": "integer",
                "default": "",
            },
            "country": {"description": "A code.", "type": "string", "default": "CH"},
            "units": {"description": "Of rain.", "type": "array", "items": {"type": "string"}},
            "place": {
                "description": "North and east.",
                "type": "array",
                "items": {"type": "number"},
            },
        },
        "required": ["town", "units", "place"],
    }


def test_xlam_parameters_may_be_a_schema_or_say_what_is_needed():
    schema = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
    flat = {
        "type": {"type": "str", "required": False},
        "km": {"type": "float", "default": 1.0, "required": True},
    }
    tools = [{"name": "f", "parameters": schema}, {"name": "g", "parameters": flat}]
    [made] = transform("xlam", {"query": "q", "answers": "[]", "tools": json.dumps(tools)})
    first, second = (tool["parameters"] for tool in json.loads(made["tools"]))
    assert first == schema
    assert second == {
        "type": "object",
        "properties": {"type": {"type": "string"}, "km": {"type": "number", "default": 1.0}},
        "required": ["km"],
    }


def test_smoltalk2_settings_of_the_template_are_read():
    [chat], rejected = read("smoltalk2")
    assert rejected == []
    assert chat.messages[0] == Message("system", "Be brief.")
    assert chat.messages[2].thought == "I have to look."
    assert calls(chat.messages[2]) == [("rain_today", {"town": "Thun"})]
    assert said(chat.messages[3:]) == [("tool", "3 mm"), ("assistant", "3 mm.")]
    assert chat.messages[4].thought is None
    assert len(chat.tools) == 1


def test_smoltalk2_preferences_are_read_with_their_settings(tmp_path: Path):
    """Its configuration Preference."""
    asked = {"role": "user", "content": ASKED}
    row = {
        "prompt": ASKED,
        **{
            side: [asked, {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n{said}"}]
            for side, thought, said in (
                ("chosen", "In Bern.", ANSWERED),
                ("rejected", "Why?", "No."),
            )
        },
        "chat_template_kwargs": {"custom_instructions": "Be brief.", "enable_thinking": True},
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [pair], rejected = read("smoltalk2", path)
    assert rejected == []
    assert said(pair.prompt) == [("system", "Be brief."), ("user", ASKED)]
    assert (pair.chosen[0].thought, pair.chosen[0].content) == ("In Bern.", ANSWERED)
    assert (pair.rejected[0].thought, pair.rejected[0].content) == ("Why?", "No.")


def test_kinds_all_have_rows_here():
    assert sorted(path.stem for path in ROWS.iterdir()) == sorted(KINDS)
    for name, kind in KINDS.items():
        named = re.fullmatch(r"transform: (\w+)", kind.settings)
        assert (kind.transform is not None) == (named is not None and named[1] == name)


CALL = '{"name": "walk", "arguments": {"km": 1}}'
BAD_ROWS = [
    ("hh_rlhf", {"chosen": "Hello.", "rejected": "\n\nHuman: a"}, "chosen: must begin with one"),
    ("kto", {"prompt": "a", "completion": "b", "label": 1}, "label: must be true or false"),
    ("kto", {"prompt": "a", "completion": "b"}, "no column 'label'"),
    ("squad", {"context": "a", "question": "b", "answers": ["c"]}, "answers: must be an object"),
    ("xlam", {"query": "a", "answers": "[", "tools": "[]"}, "answers: malformed JSON"),
    (
        "xlam",
        {
            "query": "a",
            "answers": "[]",
            "tools": '[{"name": "f", "parameters": {"x": {"type": "Callable"}}}]',
        },
        r"tools\[0\].parameters.x.type: 'Callable' has no type in JSON",
    ),
    ("glaive", {"system": "", "chat": "Hello."}, "chat: must begin with one of USER"),
    (
        "glaive",
        {"system": "", "chat": "USER: a\n\n\nASSISTANT: <functioncall> {1"},
        "chat, turn 1: malformed JSON",
    ),
    (
        "hermes",
        {"conversations": [{"from": "system", "value": "Call <tools>[]</tools>"}]},
        "declares tools in other words than Hermes'",
    ),
    (
        "hermes",
        {"conversations": [{"from": "gpt", "value": f"<tool_call>{CALL}</tool_call> Done."}]},
        "text after a <tool_call>",
    ),
    (
        "hermes",
        {
            "conversations": [
                {"from": "gpt", "value": "<tool_call>{'name': 'f', 'name': 'g'}</tool_call>"}
            ]
        },
        "malformed JSON",
    ),
    (
        "smoltalk2",
        {"messages": [], "chat_template_kwargs": {"python_tools": ["def f(): …"]}},
        "chat_template_kwargs.python_tools: is not read",
    ),
]


@pytest.mark.parametrize(("name", "row", "problem"), BAD_ROWS)
def test_rows_of_another_form_are_refused_in_one_line(name: str, row: dict, problem: str):
    made = transform(name, row)
    assert isinstance(made, BadRow)
    assert made.reason == "transform"
    assert re.match(rf"transform {name}: .*{problem}", made.problem), made.problem
    assert "\n" not in made.problem


@pytest.mark.parametrize("name", BUILT_IN_TRANSFORMS)
@pytest.mark.parametrize("damage", [None, 5, [], {}, "", [None], "x", True])
def test_damaged_rows_get_a_verdict_and_no_traceback(name: str, damage: Any):
    [first, *_] = (ROWS / f"{name}.jsonl").read_text().splitlines()
    row = json.loads(first)
    for column in row:
        made = transform(name, {**row, column: damage})
        assert isinstance(made, BadRow | list)
        made = transform(name, {key: cell for key, cell in row.items() if key != column})
        assert isinstance(made, BadRow | list)


def test_hermes_tools_that_are_declared_twice_are_refused():
    line, _ = (ROWS / "hermes.jsonl").read_text().splitlines()
    row = json.loads(line)
    turn = row["conversations"][0]
    turn["value"] += turn["value"][turn["value"].index("<tools>\n") :]
    made = transform("hermes", row)
    assert isinstance(made, BadRow)
    assert made.problem == "transform hermes: conversations[0].value: declares tools 2 times"


def test_sharegpt_answers_may_be_texts():
    """As in the first rows of hiyouga/DPO-En-Zh-20k."""
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"}
    [made] = transform("sharegpt_preference", row)
    assert made["chosen"] == [{"from": "gpt", "value": "good"}]
    assert made["rejected"] == [{"from": "gpt", "value": "bad"}]


def test_kto_rows_may_have_a_prompt_as_text_or_whole_conversations():
    """As argilla/kto-mix-15k, and as LLaMA-Factory's."""
    answer = [{"role": "assistant", "content": "x"}]
    text = {"prompt": "q", "completion": answer, "rating": 5.0}
    whole = {"messages": [{"role": "user", "content": "q"}, *answer]}
    for row in (text, whole):
        assert transform("kto", {**row, "label": True}) == [row]
        assert transform("kto", {**row, "label": False}) == []


def test_other_fields_of_a_message_are_kept():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]
    [made] = transform("hermes", {"conversations": turns})
    assert made["messages"][1] == {"weight": 0, "role": "assistant", "content": "b"}


def test_users_transform_of_a_built_in_name_is_the_users(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from post_training.data.transforms import register_transform\n"
        '@register_transform("kto")\ndef kto(row):\n    return {"mine": row["label"]}\n'
    )
    function = find_transform("kto", [mine], FunctionLimits())
    assert list(function([{"label": 1}], "row {}".format)) == [[{"mine": 1}]]


def test_misspelt_built_in_name_is_told():
    with pytest.raises(
        UsageError, match=r"unknown name 'herms', did you mean 'hermes'.*built in: "
    ):
        find_transform("herms", [], FunctionLimits())


def test_labels_without_the_transform_are_refused_with_its_name():
    config = SourcesConfig(datasets=[{"path": ROWS / "kto.jsonl"}])
    with pytest.raises(PostTrainingError, match="column label is not read") as caught:
        open_sources(config)
    assert "transform: kto" in str(caught.value.hint)
