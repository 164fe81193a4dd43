"""The texts of our templates against texts written by hand, against transformers, and against
independent implementations where the image holds one."""

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from helpers.real_data import TOKENIZERS, needs_tokenizers
from post_training.core.errors import PostTrainingError
from post_training.data.chat import rendering
from post_training.data.chat.rendering import message_dicts, render
from post_training.data.chat.templates import MARKERS, choose_template, template_text
from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import Conversation, Message, ToolCall
from post_training.data.tokenize import Encoder

DIALOGUE = (
    Message("user", "1 + 1?"),
    Message("assistant", "2"),
    Message("user", "  And\n1 + 2? "),
    Message("assistant", "\n3 "),
)
SYSTEM = Message("system", "Be brief.")
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first."},
                "how": {"type": "string", "enum": ["fast", "slow"], "default": "fast"},
                "more": {"type": "array", "items": {"type": "number"}, "nullable": True},
                "options": {
                    "type": "object",
                    "properties": {"x": {"type": "boolean"}, "y": {"type": ["string", "null"]}},
                    "required": ["x"],
                },
            },
            "required": ["a"],
        },
    },
}
CALL = Message("assistant", "", tool_calls=(ToolCall("add", '{"a":1}'),))
TWO_CALLS = Message(
    "assistant", "", tool_calls=(ToolCall("add", '{"a": 1}'), ToolCall("sub", "{}"))
)
WITH_CALL = (
    *(SYSTEM, Message("user", "1 + 1?"), CALL, Message("tool", '{"sum": 2}')),
    *(Message("assistant", "2"), Message("user", "Sure?"), Message("assistant", "Yes")),
)

CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n«2<|im_end|>»\n"
    "<|im_start|>user\n  And\n1 + 2? <|im_end|>\n"
    "<|im_start|>assistant\n«\n3 <|im_end|>»\n"
)
TULU = (
    "<|system|>\nBe brief.\n"
    "<|user|>\n1 + 1?\n"
    "<|assistant|>\n«2</s>»\n"
    "<|user|>\n  And\n1 + 2? \n"
    "<|assistant|>\n«\n3 </s>»"
)
ZEPHYR = (
    "<|system|>\nBe brief.</s>\n"
    "<|user|>\n1 + 1?</s>\n"
    "<|assistant|>\n«2</s>»\n"
    "<|user|>\n  And\n1 + 2? </s>\n"
    "<|assistant|>\n«\n3 </s>»\n"
)
MISTRAL = "<s>[INST] 1 + 1?[/INST]« 2</s>»[INST] Be brief.\n\n  And\n1 + 2? [/INST]« \n3 </s>»"
MISTRAL_V3_TEKKEN = (
    "<s>[INST]1 + 1?[/INST]«2</s>»[INST]Be brief.\n\n  And\n1 + 2? [/INST]«\n3 </s>»"
)
MISTRAL_V7_TEKKEN = (
    "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]1 + 1?[/INST]«2</s>»"
    "[INST]  And\n1 + 2? [/INST]«\n3 </s>»"
)
LLAMA_3 = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«2<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\n  And\n1 + 2? <|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«\n3 <|eot_id|>»"
)
APERTUS_HEAD = (
    "<s><|system_start|>Be brief.<|system_end|>"
    "<|developer_start|>Deliberation: disabled\nTool Capabilities: disabled<|developer_end|>"
)
APERTUS = (
    f"{APERTUS_HEAD}<|user_start|>1 + 1?<|user_end|><|assistant_start|>«2<|assistant_end|>»"
    "<|user_start|>  And\n1 + 2? <|user_end|><|assistant_start|>«\n3 <|assistant_end|>»"
)
# What Apertus was trained on before the type of each property of an object.
NESTED = "\n" + " " * 16
PLAIN = (
    "<|user|>1 + 1?<|user|><|assistant|>«2<|assistant|>»"
    "<|user|>  And\n1 + 2? <|user|><|assistant|>«\n3 <|assistant|></s>»"
)
WITH_TOOLS = ["mistral", "mistral-v3-tekken", "mistral-v7-tekken", "llama-3", "apertus"]
WRITTEN = {
    "chatml": CHATML,
    "tulu": TULU,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "mistral-v3-tekken": MISTRAL_V3_TEKKEN,
    "mistral-v7-tekken": MISTRAL_V7_TEKKEN,
    "llama-3": LLAMA_3,
    "apertus": APERTUS,
    "plain": PLAIN,
}


def dialogue(name: str) -> Conversation:
    return Conversation(DIALOGUE if name == "plain" else (SYSTEM, *DIALOGUE))


def marked(conversation: Conversation, name: str, tokenizer: Any) -> str:
    """The rendered text, with «» around what is trained."""
    template = choose_template(name, tokenizer)
    text, spans = render(
        template.text, message_dicts(conversation), tokenizer.special_tokens_map, trusted=True
    )
    for start, end in reversed(spans):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.fixture
def wide(tokenizers: Any) -> Any:
    return tokenizers["byte-level"]


@pytest.mark.parametrize("name", MARKERS)
def test_template_renders_and_marks_as_written_by_hand(name: str, wide: Any):
    assert marked(dialogue(name), name, wide) == WRITTEN[name]


@pytest.mark.parametrize("name", MARKERS)
def test_template_asks_with_what_it_was_trained_to_continue(name: str, wide: Any):
    messages = message_dicts(dialogue(name)).messages
    asked = wide.apply_chat_template(
        messages[:-1],
        chat_template=template_text(name),
        add_generation_prompt=True,
        tokenize=False,
    )
    before_answer = WRITTEN[name].rpartition("«")[0]
    assert asked == before_answer.replace("«", "").replace("»", "")


def test_mistral_renders_calls_and_tools_as_written_by_hand(wide: Any):
    conversation = Conversation(WITH_CALL, (json.dumps(TOOL),))
    assert marked(conversation, "mistral", wide) == (
        "<s>[INST] 1 + 1?[/INST]"
        '«[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "000000000"}]</s>»'
        '[TOOL_RESULTS] {"content": {"sum": 2}, "call_id": "000000000"}[/TOOL_RESULTS]'
        f"« 2</s>»[AVAILABLE_TOOLS] [{json.dumps(TOOL)}][/AVAILABLE_TOOLS]"
        "[INST] Be brief.\n\nSure?[/INST]« Yes</s>»"
    )


def test_llama_3_renders_calls_and_tools_as_written_by_hand(wide: Any):
    def head(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    assert marked(Conversation(WITH_CALL, (json.dumps(TOOL),)), "llama-3", wide) == (
        f"<s>{head('system')}Be brief.<|eot_id|>{head('user')}"
        "Given the following functions, please respond with a JSON for a function call with its "
        "proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.'
        f"Do not use variables.\n\n{json.dumps(TOOL, indent=4)}\n\n1 + 1?<|eot_id|>"
        f'{head("assistant")}«{{"name": "add", "parameters": {{"a": 1}}}}<|eot_id|>»'
        f'{head("ipython")}{{"sum": 2}}<|eot_id|>{head("assistant")}«2<|eot_id|>»'
        f"{head('user')}Sure?<|eot_id|>{head('assistant')}«Yes<|eot_id|>»"
    )


def test_apertus_renders_thoughts_calls_and_tools_in_one_turn(wide: Any):
    messages = (
        Message("user", "1 + 1?"),
        Message("assistant", "", thought="Add."),
        TWO_CALLS,
        *(Message("tool", "2"), Message("tool", "0")),
        Message("assistant", "", thought="Easy."),
        Message("assistant", "It is 2."),
        *(Message("user", "Sure?"), Message("assistant", "Yes", thought="Hm.")),
    )
    assert marked(Conversation(messages, (json.dumps(TOOL),)), "apertus", wide) == (
        "<s><|developer_start|>Deliberation: enabled\nTool Capabilities:\n"
        "// Adds.\ntype add = (_: {\n// The first.\na: number,\n"
        'how?: "fast" | "slow", // default: fast,\nmore?: number[] | null,\n'
        f"options?: {{\nx: {NESTED}boolean, y?: {NESTED}string | null}}\n"
        "}) => any;<|developer_end|>"
        "<|user_start|>1 + 1?<|user_end|><|assistant_start|>"
        '«<|inner_prefix|>Add.»«<|tools_prefix|>[{"add": {"a": 1}}, {"sub": {}}]<|tools_suffix|>»'
        "[2, 0]«Easy.»«<|inner_suffix|>It is 2.<|assistant_end|>»"
        "<|user_start|>Sure?<|user_end|><|assistant_start|>"
        "«<|inner_prefix|>Hm.»«<|inner_suffix|>Yes<|assistant_end|>»"
    )


def test_apertus_turn_goes_on_after_a_tool_output(wide: Any):
    messages = message_dicts(Conversation(WITH_CALL[:4])).messages
    asked = wide.apply_chat_template(
        messages,
        chat_template=template_text("apertus"),
        add_generation_prompt=True,
        tokenize=False,
    )
    assert asked == (
        f"{APERTUS_HEAD}<|user_start|>1 + 1?<|user_end|><|assistant_start|>"
        '<|tools_prefix|>[{"add": {"a": 1}}]<|tools_suffix|>[{"sum": 2}]'
    )


def test_apertus_developer_message_stands_in_place_of_its_own(wide: Any):
    conversation = Conversation((Message("developer", "Use no tools."), *DIALOGUE[:2]))
    assert marked(conversation, "apertus", wide) == (
        "<s><|developer_start|>Use no tools.<|developer_end|>"
        "<|user_start|>1 + 1?<|user_end|><|assistant_start|>«2<|assistant_end|>»"
    )


def test_llama_3_equals_the_template_that_trl_ships(wide: Any):
    found = importlib.util.find_spec("trl")
    theirs = Path(found.origin).parent / "chat_templates" / "llama3.jinja"
    # Theirs strips contents.
    contents = [message.content.strip() for message in (SYSTEM, *DIALOGUE)]
    roles = [message.role for message in (SYSTEM, *DIALOGUE)]
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    texts = [
        wide.apply_chat_template(messages, chat_template=template, tokenize=False)
        for template in (theirs.read_text(), template_text("llama-3"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", MARKERS)
def test_render_equals_transformers(name: str, trusted: bool, wide: Any):
    tools = (json.dumps(TOOL),) if name in WITH_TOOLS else ()
    dicts = message_dicts(Conversation(WITH_CALL if tools else dialogue(name).messages, tools))
    special = wide.special_tokens_map
    text, spans = render(template_text(name), dicts, special, trusted=trusted)
    [expected], [expected_spans] = render_jinja_template(
        conversations=[dicts.messages],
        tools=dicts.tools or None,
        chat_template=template_text(name),
        return_assistant_tokens_mask=True,
        **special,
    )
    assert text == expected
    assert spans == expected_spans


CALLS_OF_A_ROW = [
    {"id": "call_rain", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
    {"id": "call_sub", "type": "function", "function": {"name": "sub", "arguments": {}}},
]


def row_with_tools(name: str) -> dict[str, Any]:
    """As a server is sent it. llama-3 has one call at a time."""
    calls = CALLS_OF_A_ROW[: 1 if name == "llama-3" else 2]
    outputs = [
        {"role": "tool", "tool_call_id": call["id"], "name": "add", "content": str(number)}
        for number, call in enumerate(calls)
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *outputs,
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    return {"messages": messages, "tools": [TOOL]}


def read_row(row: dict[str, Any]) -> Conversation:
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    [conversation] = parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert isinstance(conversation, Conversation)
    return conversation


# Prints tools, calls and outputs as it gets them, as many a model's own template does.
PRINTS_ALL = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %} END"
    "{% endgeneration %}{% else %}{{ m.content }}{{ m.name }}{{ m.tool_call_id }}{% endif %}\n"
    "{% endfor %}"
)


def served(row: dict[str, Any], template: str, tokenizer: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], chat_template=template, **options
    )


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_row_with_tools_is_trained_as_the_saved_template_serves_it(name: str, wide: Any):
    row, template = row_with_tools(name), template_text(name)
    expected = served(row, template, wide, tokenize=False)
    head, calling, *outputs = row["messages"][:2], *row["messages"][2:-3]
    bare = {**row, "tools": [TOOL["function"]]}
    as_text = {**row, "tools": json.dumps(row["tools"])}
    swapped = {**row, "messages": [*head, calling, *outputs[::-1], *row["messages"][-3:]]}
    for same in (row, bare, as_text, swapped):
        text, _ = render(template, message_dicts(read_row(same)), wide.special_tokens_map)
        assert text == expected


@needs_tokenizers
@pytest.mark.parametrize("folder", ["smollm2", "qwen3", "deepseek-v3"])
def test_row_with_tools_has_the_ids_that_a_real_tokenizer_gives(folder: str):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZERS / folder)
    tokenizer.chat_template = PRINTS_ALL
    row = row_with_tools("model")
    encoder = Encoder.create(
        tokenizer, choose_template("model", tokenizer), control_tokens="refuse"
    )
    [sequence] = encoder.encode([read_row(row)])
    expected = served(row, PRINTS_ALL, tokenizer, tokenize=True, return_dict=True)["input_ids"]
    assert sequence.ids.tolist() == expected


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_without_a_description_or_parameters_is_rendered(name: str, wide: Any):
    row = row_with_tools(name)
    row["tools"] = [{"name": "clock", "description": None, "parameters": None}, {"name": "bell"}]
    text, _ = render(template_text(name), message_dicts(read_row(row)), wide.special_tokens_map)
    assert "clock" in text
    assert "bell" in text
    assert "null" not in text
    assert "None" not in text
    if name == "apertus":
        assert "Tool Capabilities:\ntype clock = () => any;\ntype bell = () => any;<|dev" in text


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_template_that_does_not_end_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendering, "_TIMEOUT_S", 0.2)
    conversation = Conversation((Message("user", "a question"), Message("assistant", "x")))
    with pytest.raises(PostTrainingError) as error:
        render(ENDLESS, message_dicts(conversation), {})
    assert error.value.problem == (
        "rendering one row took more than 0.2 s of processor time: the one with 'a question'"
    )
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    text, _ = render("{{ messages[0].content }}", message_dicts(conversation), {})
    assert text == "a question"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for a in range(999999) %}{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: maximum recursion"),
    ],
)
def test_template_that_fails_by_itself_is_an_error_of_the_template(template: str, problem: str):
    conversation = Conversation((Message("user", "a question"), Message("assistant", "x")))
    with pytest.raises(TemplateError, match=problem):
        render(template, message_dicts(conversation), {})
