"""Which templates are refused, because they would train nothing or something else; and what a
template knows of itself."""

import copy
from typing import Any

import pytest

from post_training.core.errors import PostTrainingError
from post_training.data.chat.templates import (
    MARKERS,
    choose_template,
    difference_from_own,
    template_text,
)
from post_training.models.save import train_tokenizer

ENDS_OF_TURNS = {
    "chatml": "<|im_end|>",
    "tulu": "</s>",
    "zephyr": "</s>",
    "mistral": "</s>",
    "mistral-v3-tekken": "</s>",
    "mistral-v7-tekken": "</s>",
    "llama-3": "<|eot_id|>",
    "apertus": "<|assistant_end|>",
    "plain": "<|assistant|>",
}


@pytest.mark.parametrize("name", MARKERS)
def test_template_knows_how_a_turn_ends(name: str, tokenizers: Any):
    assert choose_template(name, tokenizers["byte-level"]).end_of_turn == ENDS_OF_TURNS[name]


def refusal(text: str | None, tokenizer: Any, **settings: Any) -> str:
    tokenizer.chat_template = text
    with pytest.raises(PostTrainingError) as error:
        choose_template("model", tokenizer, **settings)
    return error.value.problem


def test_template_of_the_model_is_used_as_it_is(tokenizer: Any):
    tokenizer.chat_template = template_text("chatml")
    assert choose_template("model", tokenizer).text == template_text("chatml")


def test_template_of_a_model_without_one_is_refused(tokenizer: Any):
    assert refusal(None, tokenizer) == "the tokenizer has no chat template"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            "it writes nothing after an answer, so the model would never stop",
        ),
        (
            "{% for m in messages %}{% if m.role == 'robot' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "of 2 answers it marks 0 as trained: []",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{% endgeneration %}{% endif %}{{ m.content }}{% endfor %}",
            "of 2 answers it marks 2 as trained: ['', '']",
        ),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "of 2 answers it marks 1 as trained: "
            "['first-questionfirst-answersecond-questionsecond-answer']",
        ),
        (
            "{% for m in messages[1::2] %}{% generation %}{{ messages[0].content + m.content }}"
            "</s>{% endgeneration %}{% endfor %}",
            "it would train on the user's words: "
            "['first-questionfirst-answer</s>', 'first-questionsecond-answer</s>']",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "it leaves the end of a turn untrained, the model would never stop",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{{ loop.index }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "its turns end differently: ['2', '4']",
        ),
        (
            "{% generation %}{{ raise_exception('no system message') }}{% endgeneration %}",
            "it can't be rendered: no system message",
        ),
        ("{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}", "it writes today's date"),
    ],
)
def test_template_that_trains_nothing_or_the_wrong_thing_is_refused(
    text: str, problem: str, tokenizer: Any
):
    assert refusal(text, tokenizer).startswith(problem)


ONE_SPAN_EACH = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ (m.reasoning_content or '') + m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_template_that_marks_a_thought_and_its_answer_as_one_is_read_without_its_marks(
    tokenizer: Any,
):
    tokenizer.chat_template = ONE_SPAN_EACH
    assert choose_template("model", tokenizer).marks == "messages"
    assert choose_template("model", tokenizer, train_on_thoughts=False).marks == "turns"


def test_template_that_trains_on_tool_outputs_can_express_no_calls(tokenizer: Any):
    assert "calls" in choose_template("chatml", tokenizer).lost
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ('assistant', 'tool') %}{% generation %}"
        "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert "calls" in choose_template("model", tokenizer).lost
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "in ('assistant', 'tool')", "== 'assistant'"
    )
    assert "calls" not in choose_template("model", tokenizer).lost


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("chatml", {"developer", "thought", "tools", "calls", "steps"}),
        ("mistral", {"developer", "thought", "steps"}),
        ("mistral-v3-tekken", {"developer", "thought", "steps"}),
        ("mistral-v7-tekken", {"developer", "thought", "steps"}),
        ("apertus", set()),
        ("plain", {"system", "developer", "thought", "tools", "calls", "steps"}),
    ],
)
def test_template_knows_what_it_can_not_express(name: str, lost: set[str], tokenizers: Any):
    assert choose_template(name, tokenizers["byte-level"]).lost == lost


def test_template_with_markers_the_tokenizer_lacks_is_refused():
    tokenizer = train_tokenizer([], 300, (), chat_template="")
    with pytest.raises(PostTrainingError) as error:
        choose_template("chatml", tokenizer)
    assert error.value.problem == "the tokenizer has no token <|im_start|>, <|im_end|>"
    assert choose_template("tulu", tokenizer).name == "tulu"


@pytest.mark.parametrize(("name", "token"), [("tulu", "eos_token"), ("mistral", "bos_token")])
def test_template_with_a_special_token_the_tokenizer_lacks_is_refused(
    name: str, token: str, tokenizers: Any
):
    tokenizer = copy.deepcopy(tokenizers["byte-level"])
    setattr(tokenizer, token, None)
    with pytest.raises(PostTrainingError, match=f"writes the {token}, and the tokenizer has none"):
        choose_template(name, tokenizer)


def test_template_that_is_refused_names_those_of_ours_that_fit(tokenizer: Any):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(PostTrainingError) as error:
        choose_template("model", tokenizer)
    # Those of ours whose tokens this tokenizer has, and no others.
    assert str(error.value.hint).endswith("data.chat_template: chatml | tulu | zephyr")


@pytest.mark.parametrize(
    ("own", "difference"),
    [
        (None, None),
        (template_text("chatml"), None),
        (template_text("chatml") + "{# the same text #}", None),
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n" + template_text("chatml"),
            "it writes '<|im_start|>user\\nfirst-question<|im_end|' "
            "where that one writes '<|im_start|>system\\nBe kind.<|im_end|>",
        ),
        ("{{ raise_exception('no') }}", "can't be rendered"),
    ],
)
def test_template_that_writes_otherwise_than_the_tokenizers_own_is_told(
    own: str | None, difference: str | None, tokenizer: Any
):
    tokenizer.chat_template = own
    told = difference_from_own(choose_template("chatml", tokenizer), tokenizer)
    assert told == difference if difference is None else difference in told
