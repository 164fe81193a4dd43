"""Our templates beside those of the families that they are named for: by mistral_common, by real
tokenizers, and by the templates that TRL ships. Every difference is written down here."""

import json
import re
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import InstructRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool
from mistral_common.protocol.instruct.tool_calls import ToolCall as TheirCall
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers import AutoTokenizer

from helpers.real_data import TOKENIZERS, needs_tokenizers
from post_training.data.chat.rendering import message_dicts, render
from post_training.data.chat.templates import (
    ChatTemplate,
    choose_template,
    misfit,
    template_text,
)
from post_training.data.rows import Conversation, Message, ToolCall

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
SYSTEM = Message("system", "Be brief.")
CALLS = (ToolCall("add", '{"a": 1}', "call00001"), ToolCall("add", '{"a": 2}', "call00002"))
TALK = (
    Message("user", "1 + 1?"),
    Message("assistant", "2"),
    Message("user", " And\n1 + 2? "),
    Message("assistant", "\n3"),
)
OUTPUTS = (
    Message("tool", '{"sum": 2}', tool_call_id="call00001"),
    Message("tool", 'an error, "é"', tool_call_id="call00002"),
)
LOOP = (
    Message("user", "1 + 1?"),
    Message("assistant", "", tool_calls=CALLS),
    *OUTPUTS,
    Message("assistant", "2"),
    Message("user", "Sure?"),
    Message("assistant", "Yes"),
)
DATA = Path(mistral_common.__file__).parent / "data"
# By our template: the tokenizer of that format.
FORMATS = {
    "mistral": ("mistral_instruct_tokenizer_240323.model.v3", None),
    "mistral-v3-tekken": ("tekken_240911.json", "v3"),
    "mistral-v7-tekken": ("tekken_240911.json", "v7"),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MistralTokenizer]:
    """mistral_common's, by our names. Its tekken vocabularies have the special tokens of v7."""
    made, folder = {}, tmp_path_factory.mktemp("tekken")
    for name, (file, version) in FORMATS.items():
        path = DATA / file
        if version is not None:
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings["config"]["version"] = version
            path = folder / f"tekken-{version}.json"
            path.write_text(json.dumps(settings), encoding="utf-8")
        made[name] = MistralTokenizer.from_file(path)
    return made


def their_messages(messages: tuple[Message, ...]) -> list[Any]:
    made: list[Any] = []
    for message in messages:
        calls = [
            TheirCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
            for call in message.tool_calls
        ]
        if message.role == "assistant":
            made.append(AssistantMessage(content=message.content or None, tool_calls=calls or None))
        elif message.role == "tool":
            made.append(ToolMessage(content=message.content, tool_call_id=message.tool_call_id))
        elif message.role == "system":
            made.append(SystemMessage(content=message.content))
        else:
            made.append(UserMessage(content=message.content))
    return made


def their_text(name: str, messages: tuple[Message, ...], tools: bool, own: Any) -> str:
    system = next((m.content for m in messages if m.role == "system"), None)
    if name != "mistral-v7-tekken":  # There it is not one of the messages.
        messages = tuple(m for m in messages if m.role != "system")
    function = {**TOOL["function"], "strict": False}
    request = InstructRequest(
        messages=their_messages(messages),
        system_prompt=None if name == "mistral-v7-tekken" else system,
        available_tools=[Tool.model_validate({**TOOL, "function": function})] if tools else None,
    )
    tokens = own.instruct_tokenizer.encode_instruct(request).tokens
    pieces = own.instruct_tokenizer.tokenizer
    if name == "mistral":
        text = "".join(pieces.id_to_piece(token) for token in tokens)
        return text.replace("▁", " ").replace("<0x0A>", "\n")
    return pieces.decode(tokens, special_token_policy=SpecialTokenPolicy.KEEP)


@pytest.mark.parametrize("row", ["talk", "system", "loop", "system and loop"])
@pytest.mark.parametrize("name", FORMATS)
def test_mistral_formats_equal_mistral_common(
    name: str, row: str, theirs: dict[str, Any], tokenizers: Any
):
    messages = ((SYSTEM,) if "system" in row else ()) + (LOOP if "loop" in row else TALK)
    expected = their_text(name, messages, "loop" in row, theirs[name])
    # Its own way of writing JSON of a tool, which is that of its model of a tool.
    tools = ()
    if "loop" in row:
        written = expected.partition("[AVAILABLE_TOOLS]")[2].partition("[/AVAILABLE_TOOLS]")[0]
        tools = (written.strip()[1:-1],)
        assert json.loads(tools[0]) == TOOL
    dicts = message_dicts(Conversation(messages, tools))
    text, _ = render(template_text(name), dicts, tokenizers["byte-level"].special_tokens_map)
    assert text == expected


def test_mistral_v7_text_beside_calls_equals_mistral_common(
    theirs: dict[str, Any], tokenizers: Any
):
    messages = (LOOP[0], Message("assistant", "I add.", tool_calls=CALLS), *OUTPUTS, *LOOP[4:])
    name = "mistral-v7-tekken"
    text, spans = render(
        template_text(name),
        message_dicts(Conversation(messages)),
        tokenizers["byte-level"].special_tokens_map,
    )
    assert text == their_text(name, messages, False, theirs[name])
    assert next(text[start:end] for start, end in spans) == "I add."


@pytest.mark.parametrize(
    ("name", "vocabulary", "advice"),
    [
        ("mistral", "byte-level", "SentencePiece vocabulary.*: use mistral-v3-tekken or"),
        ("mistral-v7-tekken", "metaspace first", "tekken vocabulary.*: use mistral$"),
        ("mistral", "metaspace first", None),
        ("mistral-v3-tekken", "byte-level", None),
        ("chatml", "byte-level", None),
    ],
)
def test_format_of_another_vocabulary_is_told(
    name: str, vocabulary: str, advice: str | None, tokenizers: Any
):
    own = tokenizers[vocabulary]
    assert ("▁" in own.get_vocab()) == (vocabulary != "byte-level")
    told = misfit(choose_template(name, own), own)
    assert told is None if advice is None else re.search(advice, str(told))


def text_of(template: ChatTemplate, messages: tuple[Message, ...], special: Any) -> str:
    return render(template.text, message_dicts(Conversation(messages)), special)[0]


@needs_tokenizers
def test_chatml_is_smollm2_but_for_its_default_system_message():
    own = AutoTokenizer.from_pretrained(TOKENIZERS / "smollm2")
    ours, theirs = (choose_template(name, own) for name in ("chatml", "model"))
    special = own.special_tokens_map
    with_system = (SYSTEM, *TALK)
    assert text_of(ours, with_system, special) == text_of(theirs, with_system, special)
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    default = f"<|im_start|>system\n{default}<|im_end|>\n"
    assert default + text_of(ours, TALK, special) == text_of(theirs, TALK, special)


@needs_tokenizers
def test_chatml_is_qwen3_but_for_the_empty_thought_of_the_last_answer():
    own = AutoTokenizer.from_pretrained(TOKENIZERS / "qwen3")
    ours, theirs = (choose_template(name, own) for name in ("chatml", "model"))
    special = own.special_tokens_map
    messages = (SYSTEM, *TALK[:3], Message("assistant", "3"))
    head, _, answer = text_of(ours, messages, special).rpartition("3<|im_end|>")
    assert f"{head}<think>\n\n</think>\n\n3<|im_end|>{answer}" == text_of(theirs, messages, special)
    # By the family's name it writes what the tokenizer's own does, with thoughts and calls too.
    named = choose_template("qwen3", own)
    thoughts = (TALK[0], Message("assistant", "2", thought="one and one"))
    for row in (messages, LOOP, thoughts):
        dicts = message_dicts(Conversation(row, (json.dumps(TOOL),)))
        assert render(named.text, dicts, special) == render(theirs.text, dicts, special)


def test_llama_3_is_that_of_trl_but_for_stripping(tokenizers: Any):
    own = tokenizers["byte-level"]
    folder = resources.files("trl") / "chat_templates"
    theirs = (folder / "llama3.jinja").read_text(encoding="utf-8")
    messages = (SYSTEM, *TALK)
    stripped = tuple(Message(m.role, m.content.strip()) for m in messages)
    special = own.special_tokens_map
    ours = template_text("llama-3")
    written = render(theirs, message_dicts(Conversation(messages)), special)[0]
    assert render(ours, message_dicts(Conversation(stripped)), special)[0] == written
    assert render(ours, message_dicts(Conversation(messages)), special)[0] != written


def test_llama_3_is_llama_3_1_but_for_dates_and_quoted_outputs(tokenizers: Any):
    """The original is there by its name."""
    own = tokenizers["byte-level"]
    named = choose_template("llama-3.1", own, today=None)
    special = own.special_tokens_map
    row = (SYSTEM, LOOP[0], Message("assistant", "", tool_calls=CALLS[:1]), OUTPUTS[0], *LOOP[4:])
    dicts = message_dicts(Conversation(row, (json.dumps(TOOL),)))
    original = render(named.text, dicts, special)[0]
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert f"Environment: ipython\n{dates}" in original
    assert json.dumps('{"sum": 2}') in original
    same = original.replace(f"Environment: ipython\n{dates}", "")
    same = same.replace(json.dumps('{"sum": 2}'), '{"sum": 2}')
    assert same == render(template_text("llama-3"), dicts, special)[0]


def test_llama_3_2_writes_the_date_that_was_set(tokenizers: Any):
    own = tokenizers["byte-level"]
    text = text_of(choose_template("llama-3.2", own, today=date(2026, 7, 26)), TALK, {})
    assert "Today Date: 26 Jul 2026" in text


# By a parameter: its type as the original writes it (src/templates/chat_template.jinja of
# swiss-ai/apertus_format at e473d76, which is that of Apertus-8B-Instruct-2509 in its tools).
APERTUS_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "items": {"type": "string", "enum": ["a"]}}, "string[]"),
    ({"type": "array", "items": {"type": "integer"}, "nullable": True}, "number[] | null"),
    ({"type": "array", "items": {"type": ["object", "object"]}}, "any[]"),
    ({"type": "array", "items": {"type": "object"}}, "object[]"),
    ({"type": "integer", "enum": [1, 2], "default": 1}, "number, // default: 1"),
    ({"type": "string", "enum": ["a", "b"], "nullable": True}, '"a" | "b"'),
    ({"type": "number", "nullable": True}, "number"),
    ({"type": ["string", "null"]}, "string | null"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "any"),
    (
        {"oneOf": [{"type": "string", "description": "Its name."}, {"type": "boolean"}]},
        "string// Its name. | \nboolean",
    ),
    (
        {"oneOf": [{"type": "string", "default": "x"}], "default": "y"},
        f'string{" " * 20}// default: "x"// default: y',
    ),
]


@pytest.mark.parametrize(("parameter", "written"), APERTUS_TYPES)
def test_apertus_writes_types_as_the_original(
    parameter: dict[str, Any], written: str, tokenizers: Any
):
    tool = {"name": "f", "description": "F.", "parameters": {"properties": {"p": parameter}}}
    dicts = message_dicts(Conversation(TALK, (json.dumps({"type": "function", "function": tool}),)))
    text, _ = render(template_text("apertus"), dicts, {"bos_token": "<s>"})
    assert f"// F.\ntype f = (_: {{\np?: {written}\n}}) => any;<|developer_end|>" in text


def test_apertus_has_its_default_system_message_with_the_date_that_is_set(tokenizers: Any):
    own = tokenizers["byte-level"]
    special = own.special_tokens_map
    plain, dated = (choose_template("apertus", own, today=day) for day in (None, date(2026, 1, 31)))
    default = (
        "<|system_start|>You are Apertus, a helpful assistant created by the SwissAI initiative.\n"
        "Knowledge cutoff: 2024-04\nCurrent date: 2026-01-31<|system_end|>"
    )
    without = text_of(plain, TALK, special)
    assert text_of(dated, TALK, special) == without.replace("<s>", f"<s>{default}")
    assert "Current date" not in without
    with_system = (SYSTEM, *TALK)
    assert text_of(dated, with_system, special) == text_of(plain, with_system, special)
    # What a server renders by the saved template, with the day of today at hand.
    asked = own.apply_chat_template(
        message_dicts(Conversation(TALK[:1])).messages,
        chat_template=dated.text,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text_of(dated, TALK, special).startswith(asked)


OLMO3_HEAD = (
    "<|im_start|>system\nYou are a helpful function-calling AI assistant. You do not currently "
    "have access to any functions. <functions></functions><|im_end|>\n"
)


def test_olmo3_is_written_as_its_format_says(tokenizers: Any):
    own = tokenizers["byte-level"]
    named = choose_template("olmo3", own)
    special = own.special_tokens_map
    assert text_of(named, TALK, special) == (
        f"{OLMO3_HEAD}<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n And\n1 + 2? <|im_end|>\n<|im_start|>assistant\n\n3</s>"
    )
    dicts = message_dicts(Conversation((SYSTEM, *LOOP[:5]), (json.dumps(TOOL),)))
    assert render(named.text, dicts, special)[0] == (
        f"<|im_start|>system\nBe brief.<functions>[{json.dumps(TOOL)}]</functions><|im_end|>\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n<function_calls>add(a=1)\nadd(a=2)</function_calls><|im_end|>\n"
        '<|im_start|>environment\n{"sum": 2}<|im_end|>\n'
        '<|im_start|>environment\nan error, "é"<|im_end|>\n<|im_start|>assistant\n2</s>'
    )
    assert named.lost == {"developer", "thought", "steps"}


def test_smollm3_is_written_as_its_format_says(tokenizers: Any):
    own = tokenizers["byte-level"]
    named = choose_template("smollm3", own, today=date(2026, 7, 26))
    system = Message("system", "Be brief. /no_think")
    assert text_of(named, (system, *TALK[:2]), {}) == (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
        "Today Date: 26 July 2026\nReasoning Mode: /no_think\n\n"
        "## Custom Instructions\n\nBe brief.\n\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n2<|im_end|>\n"
    )
    assert "Reasoning Mode: /think" in text_of(named, TALK, {})
    assert {"thought", "tools", "calls"} <= named.lost
