from typing import Any

import pytest

from post_training.core.errors import PostTrainingError
from post_training.data.chat_templates import choose_template, render, template_text

pytestmark = pytest.mark.stack

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "  And\n1 + 2? "},
    {"role": "assistant", "content": "\n3 "},
]
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n"
    "<|im_start|>user\n  And\n1 + 2? <|im_end|>\n"
    "<|im_start|>assistant\n\n3 <|im_end|>\n"
)
TULU = (
    "<|system|>\nBe brief.\n"
    "<|user|>\n1 + 1?\n"
    "<|assistant|>\n2</s>\n"
    "<|user|>\n  And\n1 + 2? \n"
    "<|assistant|>\n\n3 </s>"
)


@pytest.mark.parametrize(
    ("name", "text", "trained", "prompt"),
    [
        ("chatml", CHATML, ["2<|im_end|>", "\n3 <|im_end|>"], "<|im_start|>assistant\n"),
        ("tulu", TULU, ["2</s>", "\n3 </s>"], "<|assistant|>\n"),
    ],
)
def test_template_renders_and_marks_as_written_by_hand(
    name: str, text: str, trained: list[str], prompt: str, tokenizer: Any
):
    template = choose_template(name, tokenizer)
    [(rendered, spans)] = render([CONVERSATION], template.text, tokenizer)
    assert rendered == text
    assert [rendered[start:end] for start, end in spans] == trained
    asked = tokenizer.apply_chat_template(
        CONVERSATION[:-1],
        chat_template=template.text,
        add_generation_prompt=True,
        tokenize=False,
    )
    # What the model is asked with is what it was trained to continue.
    assert rendered.startswith(asked)
    assert asked.endswith(prompt)
    assert template.end_of_turn == trained[0][1:]


def refusal(text: str | None, tokenizer: Any) -> str:
    tokenizer.chat_template = text
    with pytest.raises(PostTrainingError) as error:
        choose_template("model", tokenizer)
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
            "it has no {% generation %} marks, so nothing would be trained",
        ),
        (
            "{% for m in messages %}{% if m.role == 'robot' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "of two answers it marks 0 turn(s) as trained: []",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
            "{% endgeneration %}{% endif %}{{ m.content }}{% endfor %}",
            "of two answers it marks 2 turn(s) as trained: ['', '']",
        ),
        (
            "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
            "of two answers it marks 1 turn(s) as trained: "
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
            "it leaves the end of a turn untrained, the model would never stop: "
            "['first-answer', 'second-answer']",
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


def test_template_with_markers_the_tokenizer_lacks_is_refused():
    from post_training.models.create import train_tokenizer

    tokenizer = train_tokenizer([], 300, (), chat_template="")
    with pytest.raises(PostTrainingError) as error:
        choose_template("chatml", tokenizer)
    assert error.value.problem == "the tokenizer has no token <|im_start|>, <|im_end|>"
    assert choose_template("tulu", tokenizer).name == "tulu"


def test_template_that_ends_turns_with_an_eos_the_tokenizer_lacks_is_refused(tokenizer: Any):
    tokenizer.eos_token = None
    with pytest.raises(PostTrainingError, match="has no eos token to end a turn with"):
        choose_template("tulu", tokenizer)
