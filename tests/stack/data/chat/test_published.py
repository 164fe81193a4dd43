"""Templates that others wrote: their files, their names, their date."""

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from post_training.core.errors import PostTrainingError
from post_training.data.chat.published import fix_date, read_template
from post_training.data.chat.templates import choose_template, template_text
from post_training.data.config import PUBLISHED_TEMPLATES

GUARDED = (
    "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}"
    "{% else %}{% set d = '26 Jul 2024' %}{% endif %}<{{ d }}>"
)
TURNS = (
    "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    "{{ 'assistant' if add_generation_prompt }}"
)


@pytest.mark.parametrize("name", PUBLISHED_TEMPLATES)
def test_template_of_a_published_model_is_there(name: str, tokenizer: Any):
    assert "messages" in read_template(name, tokenizer)


def test_template_of_a_file_is_read_as_it_is(tmp_path: Path, tokenizer: Any):
    path = tmp_path / "own.jinja"
    path.write_text(TURNS + "{# é #}", encoding="utf-8")
    template = choose_template(path, tokenizer)
    assert (template.name, template.text) == (str(path), TURNS + "{# é #}")
    assert template.end_of_turn == "</s>"


@pytest.mark.parametrize(
    ("content", "problem"), [(None, "can't be read: No such file"), (b"\xff", "not text in UTF-8")]
)
def test_template_file_that_can_not_be_read_is_refused(
    content: bytes | None, problem: str, tmp_path: Path, tokenizer: Any
):
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PostTrainingError) as error:
        choose_template(path, tokenizer)
    assert problem in error.value.problem


def test_tokenizer_with_several_templates_is_refused_by_their_names(tokenizer: Any):
    tokenizer.chat_template = {"default": TURNS, "tool_use": TURNS}
    with pytest.raises(PostTrainingError, match="has several: default, tool_use"):
        choose_template("model", tokenizer)


@pytest.mark.parametrize(
    ("today", "expected"), [(None, "<26 Jul 2024>"), (date(2026, 1, 2), "<02 Jan 2026>")]
)
def test_date_with_a_default_is_fixed_at_inference_too(
    today: date | None, expected: str, tokenizer: Any
):
    """transformers always offers today's date."""
    tokenizer.chat_template = GUARDED + TURNS
    template = choose_template("model", tokenizer, today=today)
    tokenizer.chat_template = template.text
    messages = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{expected}usera</s>assistant"


def test_date_without_a_default_is_refused_until_it_is_fixed(tokenizer: Any):
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + TURNS
    with pytest.raises(PostTrainingError, match="writes today's date") as error:
        choose_template("model", tokenizer)
    assert "data.template_date" in str(error.value.hint)
    assert (
        choose_template("model", tokenizer, today=date(2026, 1, 2)).text == "{{ '2026' }}" + TURNS
    )


def test_date_in_a_format_that_is_not_fixed_is_refused():
    with pytest.raises(PostTrainingError, match="in a way that can't be fixed"):
        fix_date("{{ strftime_now(my_format) }}", date(2026, 1, 2))


def test_date_for_a_template_that_asks_for_none_is_refused(tokenizer: Any):
    tokenizer.chat_template = TURNS
    for name in ("model", "chatml"):
        with pytest.raises(PostTrainingError, match="the template asks for no date"):
            choose_template(name, tokenizer, today=date(2026, 1, 2))


@pytest.mark.parametrize(
    "own",
    [
        "{% set d = '26 Jul 2024' %}{% if not d is defined %}{% set d = strftime_now('%d') %}"
        "{% endif %}<{{ d }}>",
        "{# strftime_now('%Y') #}<2024>",
    ],
)
def test_date_for_a_template_that_has_its_own_is_refused(own: str, tokenizer: Any):
    tokenizer.chat_template = own + TURNS
    with pytest.raises(PostTrainingError, match="has a date of its own, which it writes"):
        choose_template("model", tokenizer, today=date(2026, 1, 2))
    assert choose_template("model", tokenizer).end_of_turn == "</s>"


def test_date_that_only_a_conversation_with_tools_has_is_taken(tokenizer: Any):
    tokenizer.chat_template = "{% if tools %}{{ strftime_now('%A') }}{% endif %}" + TURNS
    template = choose_template("model", tokenizer, today=date(2026, 1, 2))
    assert "'Friday'" in template.text


def test_named_template_of_ours_is_never_a_published_one(tokenizer: Any):
    assert choose_template("chatml", tokenizer).text == template_text("chatml")
