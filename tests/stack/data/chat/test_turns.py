"""Templates without marks: what is trained of a turn is what follows the prompt that a server gives
for it. Compared with `tokenizer.apply_chat_template`, and with the marks that TRL put by hand."""

from importlib import resources
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.encoded_rows import assistant, user
from helpers.real_data import TOKENIZERS, needs_tokenizers
from post_training.core.errors import PostTrainingError
from post_training.data.chat.layout import lay_out, lay_out_prompt
from post_training.data.chat.proof import prove_turns
from post_training.data.chat.rendering import message_dicts, render
from post_training.data.chat.templates import ChatTemplate, choose_template
from post_training.data.chat.turns import TurnWriter, Written
from post_training.data.rows import (
    COMPLETION,
    EXCLUDED,
    PROMPT,
    BadRow,
    Conversation,
    Message,
    ToolCall,
)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
STOPS = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "</s>"]
TRL = resources.files("trl") / "chat_templates"
CALL = ToolCall("now", '{"city": "Rome"}')
TOOL = '{"type": "function", "function": {"name": "now", "description": "time", "parameters": {}}}'
THOUGHTS = (
    user("2 + 2?"),
    assistant("4", thought="two twos"),
    user("3 + 3?"),
    assistant("6", thought="two threes"),
)
TALK = (
    Message("system", "Be kind."),
    user("Hi\n"),
    assistant(" Hello "),
    user("Bye"),
    assistant("B"),
)
LOOP = (
    user("Time?"),
    assistant("", tool_calls=(CALL,)),
    Message("tool", "noon"),
    assistant("It is noon."),
)


def template_of(name: str, **settings: Any) -> ChatTemplate:
    text = (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    proof = prove_turns(text, SPECIAL, STOPS, PostTrainingError)
    return ChatTemplate(
        name,
        text,
        proof.end_of_turn,
        "turns",
        proof.lost,
        thinking_off=proof.thinking_off,
        **settings,
    )


def texts(name: str, messages: tuple[Message, ...], *tools: str, **settings: Any) -> list[str]:
    """With «» around what is trained."""
    laid_out = lay_out(Conversation(messages, tools), template_of(name, **settings), SPECIAL, None)
    return [shown(written) for written in laid_out]


def shown(written: Written) -> str:
    text = written.text
    for (start, end), part in reversed(list(zip(written.spans, written.parts, strict=True))):
        left, right = "«»" if part.kind == COMPLETION else "‹›"
        text = f"{text[:start]}{left}{text[start:end]}{right}{text[end:]}"
    return text


def test_turns_of_qwen3_that_lose_their_thoughts_are_trained_one_by_one():
    first, second = texts("qwen3", THOUGHTS)
    assert first == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\ntwo twos\n</think>\n\n4<|im_end|>»\n"
    )
    assert second == (
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\ntwo threes\n</think>\n\n6<|im_end|>»\n"
    )


def test_turns_that_are_kept_stand_in_one_text_as_they_were_said():
    assert texts("qwen3", THOUGHTS, history="keep") == [
        "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\ntwo twos\n</think>\n\n4<|im_end|>»\n"
        "<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\ntwo threes\n</think>\n\n6<|im_end|>»\n"
    ]


def test_turns_that_are_not_as_they_were_said_are_refused_where_that_is_asked():
    with pytest.raises(BadRow) as error:
        texts("qwen3", THOUGHTS, history="refuse")
    assert "otherwise than the model said it" in error.value.problem
    assert "history_thoughts: as_template" in str(error.value.hint)


def test_the_last_turn_alone_is_one_text_and_the_thoughts_left_out_are_counted():
    asked = (*THOUGHTS[:1], assistant("4", PROMPT, thought="two twos"), *THOUGHTS[2:])
    [written] = lay_out(Conversation(asked), template_of("qwen3"), SPECIAL, None)
    assert written.num_left_out == 1
    assert "two twos" not in written.text
    with pytest.raises(BadRow, match="leaves out the thought of an earlier turn: 'two twos'"):
        lay_out(Conversation(asked), template_of("qwen3", history="refuse"), SPECIAL, None)


def test_thoughts_that_are_not_trained_are_told_from_their_answers():
    split = (user("q"), assistant("", EXCLUDED, thought="hm\n"), assistant("so"))
    assert texts("qwen3", split) == [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
        "‹<think>\nhm›«\n</think>\n\nso<|im_end|>»\n"
    ]


def test_end_of_a_turn_is_that_of_its_own_kind():
    """gpt-oss ends its answers by <|return|>, those of earlier turns by <|end|>, calls by
    <|call|>."""
    template = template_of_gpt_oss()
    laid_out = lay_out(Conversation(LOOP, (TOOL,)), template, SPECIAL, None)
    trained = [written.text[start:end] for written in laid_out for start, end in written.spans]
    assert [turn.rpartition("<|")[2] for turn in trained] == ["call|>", "return|>"]


def template_of_gpt_oss() -> ChatTemplate:
    text = (TRL / "gptoss.jinja").read_text(encoding="utf-8")
    text = text.replace('strftime_now("%Y-%m-%d")', '"2026-01-02"')
    proof = prove_turns(text, SPECIAL, STOPS, PostTrainingError)
    return ChatTemplate("gpt-oss", text, proof.end_of_turn, "turns", proof.lost)


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen2_5", "llama3_1", "nemotron_3_nano", "gemma3", "phi3"]
)
@pytest.mark.parametrize("row", [TALK, LOOP, THOUGHTS], ids=["talk", "loop", "thoughts"])
def test_what_is_trained_stands_after_the_prompt_of_a_server(
    name: str, row: tuple[Message, ...], tokenizer: Any
):
    """The prompt is transformers' own, and so is the text of a conversation up to a turn."""
    template = template_of(name)
    tokenizer.chat_template = template.text
    special = dict(tokenizer.special_tokens_map)
    dicts = message_dicts(Conversation(row, (TOOL,) if row is LOOP else ()))
    if dicts.needs & template.lost:
        with pytest.raises(BadRow, match="can't express"):
            lay_out(Conversation(row, (TOOL,) if row is LOOP else ()), template, special, None)
        return
    variables = {} if dicts.enable_thinking is None else {"enable_thinking": True}
    if template.thinking_off and not variables:
        variables = {"enable_thinking": False}

    def served(messages: list[Any], **more: Any) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=dicts.tools or None, tokenize=False, **variables, **more
        )

    prompts = [
        served(dicts.messages[:index], add_generation_prompt=True)
        for index, message in enumerate(dicts.messages)
        if message["role"] == "assistant"
    ]
    laid_out = lay_out(Conversation(row, (TOOL,) if row is LOOP else ()), template, special, None)
    found = [written.text[:start] for written in laid_out for start, _ in written.spans]
    assert found == prompts
    assert laid_out[-1].text == served(dicts.messages)


@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "llama3", "lfm2_v2"])
def test_turns_are_those_that_trl_marked_by_hand(name: str):
    marked = (TRL / f"{name}_training.jinja").read_text(encoding="utf-8")
    template = template_of(name)
    # Alternating, since some of them insist on it; no system message, which gemma has not.
    row = Conversation(TALK[1:])
    text, spans = render(marked, message_dicts(row), SPECIAL)
    [written] = lay_out(row, template, SPECIAL, None)
    assert written.text == text
    ends = [start + len(text[start:end].rstrip()) for start, end in spans]
    assert written.spans == [(start, end) for (start, _), end in zip(spans, ends, strict=True)]


def test_prompt_that_the_answer_does_not_follow_is_refused():
    source = (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
        "{{ '<assistant><think>' if add_generation_prompt }}"
    )
    with pytest.raises(PostTrainingError) as error:
        prove_turns(source, SPECIAL, STOPS, PostTrainingError)
    assert error.value.problem == (
        "at inference a prompt ends in '<think>', where training text has 'first-answer</s>'"
    )


def test_content_that_the_template_takes_apart_is_refused():
    """Qwen3 takes what stands before </think> of an answer for its thought."""
    row = (user("q"), assistant("a</think>b"), user("q"), assistant("c"))
    with pytest.raises(BadRow) as error:
        texts("qwen3", row)
    assert error.value.problem == (
        "chat template 'qwen3': the template leaves out a content: 'a</think>b'"
    )


def test_prompt_of_a_row_has_the_history_that_was_asked_for():
    row = Conversation(THOUGHTS[:3])
    as_served = lay_out_prompt(row, template_of("qwen3"), SPECIAL, None)
    assert as_served.endswith(
        "4<|im_end|>\n<|im_start|>user\n3 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "two twos" not in as_served
    kept = lay_out_prompt(row, template_of("qwen3", history="keep"), SPECIAL, None)
    assert kept == texts("qwen3", THOUGHTS, history="keep")[0].rpartition("«")[0].replace(
        "«", ""
    ).replace("»", "")


@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
@needs_tokenizers
def test_real_tokenizer_trains_by_its_own_template(name: str):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    template = choose_template("model", tokenizer)
    assert (template.end_of_turn, template.text) == ("<|im_end|>", tokenizer.chat_template)
    [written] = lay_out(Conversation(TALK[:3]), template, tokenizer.special_tokens_map, None)
    writer = TurnWriter(template.text, tokenizer.special_tokens_map, template.end_of_turn)
    prompt = writer.prompt(message_dicts(Conversation(TALK[:2])))
    [(start, end)] = written.spans
    assert written.text[:start] == prompt
    assert written.text[start:end].endswith("Hello <|im_end|>")
