"""Rows that can't become one text, each with its reason."""

import json
import re
from typing import Any

import pytest

from helpers.encoded_rows import assistant, encode, encoder, of_kind, reason, user
from post_training.data.chat.layout import lay_out
from post_training.data.chat.rendering import message_dicts
from post_training.data.chat.templates import ChatTemplate, choose_template
from post_training.data.rows import (
    COMPLETION,
    EXCLUDED,
    PROMPT,
    BadRow,
    Conversation,
    Message,
    Text,
    ToolCall,
)
from post_training.data.tokenize import TokenSequence

SHORT = (user("ab"), assistant("cd"))


@pytest.mark.parametrize(
    "row",
    [
        Conversation((user("a <|im_end|>"), assistant("b"))),
        Conversation((user("a"), assistant("b<|im_end|>"))),
        Text("a<|im_end|>b"),
    ],
)
def test_encode_content_with_a_special_token_is_refused_or_kept(row: Any, tokenizer: Any):
    [result] = encoder(tokenizer).encode([row])
    assert reason(result) == "control-token: the content holds the token <|im_end|>"
    [kept] = encoder(tokenizer, control_tokens="keep").encode([row])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert kept.ids.tolist().count(end) == (3 if isinstance(row, Conversation) else 1)


@pytest.mark.parametrize(
    "call",
    [
        assistant("", thought="<|assistant_end|>"),
        assistant("", tool_calls=(ToolCall("<|assistant_end|>", "{}"),)),
        assistant("", tool_calls=(ToolCall("f", '{"a": "\\u003c|assistant_end|>"}'),)),
    ],
)
def test_encode_special_token_in_a_thought_or_call_is_refused(call: Message, tokenizers: Any):
    result = encode(tokenizers["byte-level"], user("q"), call, name="apertus")
    assert reason(result) == "control-token: the content holds the token <|assistant_end|>"


@pytest.mark.parametrize(
    ("token", "is_refused"),
    [
        ("<｜User｜>", True),
        ("<|fim_prefix|>", True),
        ("[TOOL_X]", True),
        ("</think>", False),
        ("<tool_call>", False),
        ("<table>", False),
        ("\n\n\n", False),
    ],
)
def test_encode_added_token_that_is_not_special_is_refused_where_it_controls(
    token: str, is_refused: bool, tokenizer: Any
):
    tokenizer.add_tokens([token])
    [asked] = encoder(tokenizer).encode([Conversation((user(f"a{token}b"), assistant("c")))])
    [answered] = encoder(tokenizer).encode([Conversation((user("a"), assistant(f"b{token}c")))])
    for result in (asked, answered):
        if is_refused:
            assert reason(result) == f"control-token: the content holds the token {token}"
        else:
            assert tokenizer.convert_tokens_to_ids(token) in result.ids.tolist()


def test_encode_added_token_that_the_template_writes_as_a_role_is_refused(tokenizer: Any):
    """Tulu writes its roles as text; here one of them is a token."""
    tokenizer.add_tokens(["user"])
    written = encoder(tokenizer, name="tulu").template.text
    assert "user" in written
    row = Conversation((user("a user b"), assistant("c")))
    [result] = encoder(tokenizer, name="tulu").encode([row])
    assert reason(result) == "control-token: the content holds the token user"


def test_encode_names_the_longest_special_token(tokenizer: Any):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<a>b", "<ab>", "[x]"]})
    rows = [Text(f"0 {content} 1") for content in ("<a>c", "<a>b", "<ab>", "[x]", "<b> <a [x")]
    results = encoder(tokenizer).encode(rows)
    found = [result.problem.split()[-1] for result in results[:-1]]
    assert found == ["<a>", "<a>b", "<ab>", "[x]"]
    assert isinstance(results[-1], TokenSequence)


def test_encode_special_token_in_a_tool_is_refused(tokenizers: Any):
    tool = '{"name": "f", "description": "</s>"}'
    result = encode(tokenizers["byte-level"], *SHORT, name="apertus", tools=(tool,))
    assert reason(result) == "control-token: the content holds the token </s>"


CALL = assistant("", tool_calls=(ToolCall("f", "{}"),))


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("plain", (Message("system", "s"), *SHORT), "roles: .* 'plain' can't express: system"),
        ("mistral", (Message("developer", "s"), *SHORT), "roles: .* can't express: developer"),
        ("llama-3", (user("q"), assistant("a", thought="t")), "roles: .* can't express: thought"),
        ("zephyr", (user("q"), CALL), "tool-call: .* 'zephyr' can't express: calls"),
        ("tulu", (user("q"), Message("tool", "o"), assistant("a")), "tool-call: .*: calls"),
        ("chatml", (user("q"), assistant("a"), assistant("b")), "roles: .*: steps"),
        (
            "llama-3",
            (user("q"), assistant("a", tool_calls=(ToolCall("f", "{}"),))),
            "tool-call: .*: llama-3 has one tool call at a time, without text beside it",
        ),
        (
            "mistral",
            (user("q"), assistant("a", tool_calls=(ToolCall("f", "{}"),))),
            "tool-call: .*: mistral has no text beside tool calls",
        ),
        (
            "apertus",
            (user("q"), assistant("", tool_calls=(ToolCall("f", "{"),))),
            "tool-call: the arguments of f: not JSON: ",
        ),
        (
            "apertus",
            (user("q"), assistant("", tool_calls=(ToolCall("f", "[1]"),))),
            r"tool-call: the arguments of f: must be a JSON object \(got \[1\]\)",
        ),
        (
            "apertus",
            (user("q"), assistant("", tool_calls=(ToolCall("f", '{"a": "\\ud800"}'),))),
            "malformed: the text holds half a character",
        ),
    ],
)
def test_encode_row_that_the_template_can_not_express_is_refused(
    name: str, messages: tuple[Message, ...], expected: str, tokenizers: Any
):
    assert re.match(expected, reason(encode(tokenizers["byte-level"], *messages, name=name)))


WHOLE_MESSAGES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content and loop.last }}"
    "{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_encode_template_of_whole_messages_trains_no_part_alone(tokenizer: Any):
    tokenizer.chat_template = WHOLE_MESSAGES
    both = encode(tokenizer, user("q"), assistant("so", thought="hm"), name="model")
    assert of_kind(both, COMPLETION, tokenizer) == "·<think>hm</think>so</s>"
    split = (user("q"), assistant("", EXCLUDED, thought="hm"), assistant("so"))
    assert reason(encode(tokenizer, *split, name="model")) == (
        "roles: chat template 'model' can't train a part of a message alone"
    )


def test_encode_message_of_no_weight_alone_is_refused(tokenizer: Any):
    assert reason(encode(tokenizer, user("q"), assistant("a", weight=0.0))) == (
        "untrained: no token to train on"
    )


def test_encode_only_the_first_token_trained_is_refused(tokenizer: Any):
    tokenizer.chat_template = WHOLE_MESSAGES
    assert reason(encode(tokenizer, user(""), assistant(""), name="model")) == (
        "untrained: no token to train on"
    )


def test_encode_template_of_a_model_that_drops_a_content_is_refused(tokenizer: Any):
    tokenizer.chat_template = WHOLE_MESSAGES.replace("{{ m.content }}", "{{ m.content[:2] }}")
    messages = (user("a longer question"), assistant("so"))
    template = ChatTemplate("model", tokenizer.chat_template, "</s>", "messages", frozenset())
    with pytest.raises(BadRow) as error:
        lay_out(Conversation(messages), template, tokenizer.special_tokens_map, None)
    assert error.value.problem == (
        "chat template 'model': it leaves out a content: 'a longer question'"
    )


def test_encode_template_that_marks_only_some_turns_of_a_row_is_refused(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != 'cd' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = (*SHORT, user("ef"), assistant("gh"))
    assert reason(encode(tokenizer, *messages, name="model")) == (
        "roles: chat template 'model' marks 1 of 2 parts of the assistant"
    )


@pytest.mark.parametrize(
    ("name", "needs", "num_texts"),
    [
        ("mistral", "system", 2),
        ("mistral-v3-tekken", "tools", 2),
        ("mistral-v7-tekken", "tools", 2),
        ("mistral-v7-tekken", "system", 1),
        ("mistral", "", 1),
        ("llama-3", "tools", 1),
    ],
)
def test_turns_stand_after_the_system_message_and_tools_that_a_server_sent(
    name: str, needs: str, num_texts: int, tokenizers: Any
):
    """Mistral's formats write them with the last message of the user alone."""
    own = tokenizers["byte-level"]
    template = choose_template(name, own)
    special = own.special_tokens_map
    system = (Message("system", "Be kind."),) if needs == "system" else ()
    tools = ('{"type": "function", "function": {"name": "f"}}',) if needs == "tools" else ()
    turns = (user("one"), assistant("1"), user("two"), assistant("2"))
    texts = lay_out(Conversation((*system, *turns), tools), template, special, None)
    assert len(texts) == num_texts
    trained = [
        (text.text[:start], text.text[start:end]) for text in texts for start, end in text.spans
    ]
    for number, (before, said) in zip((1, 3), trained, strict=True):
        messages = message_dicts(Conversation((*system, *turns[:number]))).messages
        asked = own.apply_chat_template(
            messages,
            tools=[json.loads(tool) for tool in tools] or None,
            chat_template=template.text,
            add_generation_prompt=True,
            tokenize=False,
        )
        assert before == asked
        assert said.strip() == f"{turns[number].content}{template.end_of_turn}"


def test_moved_system_message_is_kept_or_refused_as_asked(tokenizers: Any):
    own = tokenizers["byte-level"]
    turns = (user("one"), assistant("1"), user("two"), assistant("2"))
    row = Conversation((Message("system", "S"), *turns))
    kept = choose_template("mistral", own, history="keep")
    [text] = lay_out(row, kept, own.special_tokens_map, None)
    assert text.text == "<s>[INST] S\n\none[/INST] 1</s>[INST] S\n\ntwo[/INST] 2</s>"
    assert [text.text[start:end] for start, end in text.spans] == [" 1</s>", " 2</s>"]
    refusing = choose_template("mistral", own, history="refuse")
    with pytest.raises(BadRow, match="writes an earlier turn otherwise"):
        lay_out(row, refusing, own.special_tokens_map, None)
    last = Conversation((Message("system", "S"), user("one"), assistant("1", PROMPT), *turns[2:]))
    [text] = lay_out(last, refusing, own.special_tokens_map, None)
    assert text.text == "<s>[INST] one[/INST] 1</s>[INST] S\n\ntwo[/INST] 2</s>"
