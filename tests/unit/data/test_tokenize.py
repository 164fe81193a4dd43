from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import PostTrainingError
from post_training.data.chat_templates import choose_template
from post_training.data.conversations import Conversation, Message
from post_training.data.tokenize import IGNORED, TokenizedRow, tokenize

pytestmark = pytest.mark.stack


def conversation(*turns: tuple[str, str, bool], where: str = "rows.jsonl:1") -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), where)


SHORT = conversation(("user", "ab", False), ("assistant", "cd", True))
TWO_TURNS = conversation(
    ("system", "s", False),
    ("user", "ab", False),
    ("assistant", "cd", True),
    ("user", "ef", False),
    ("assistant", "gh", True),
)


def rows(tokenizer: Any, *items: Conversation, limit: int = 1000, name: str = "chatml") -> list:
    return list(tokenize(items, tokenizer, choose_template(name, tokenizer), limit))


def trained(row: TokenizedRow, tokenizer: Any) -> str:
    """The text of the trained tokens, `·` for each of the others."""
    return "".join("·" if label == IGNORED else tokenizer.decode([label]) for label in row.labels)


def test_tokenize_trains_the_answer_and_its_end(tokenizer: Any):
    [row] = rows(tokenizer, SHORT)
    #       <|im_start|> user \n ab <|im_end|> \n <|im_start|> assistant \n
    prompt = 1 + 4 + 1 + 2 + 1 + 1 + 1 + 9 + 1
    assert trained(row, tokenizer) == "·" * prompt + "cd<|im_end|>" + "·"
    assert tokenizer.decode(row.input_ids) == (
        "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"
    )
    assert row.num_trained_tokens == 3
    assert all(
        label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True)
    )


def test_tokenize_trains_every_turn_of_the_assistant(tokenizer: Any):
    [row] = rows(tokenizer, TWO_TURNS)
    assert trained(row, tokenizer).replace("·", "") == "cd<|im_end|>gh<|im_end|>"


def test_tokenize_leaves_the_assistant_of_a_prompt_untrained(tokenizer: Any):
    first = conversation(
        ("user", "ab", False),
        ("assistant", "cd", False),
        ("user", "ef", False),
        ("assistant", "gh", True),
    )
    [row] = rows(tokenizer, first, name="tulu")
    assert trained(row, tokenizer).strip("·") == "gh</s>"


def test_tokenize_cuts_the_end_and_says_so(tokenizer: Any):
    [whole] = rows(tokenizer, SHORT)
    length = len(whole.input_ids)
    [same] = rows(tokenizer, SHORT, limit=length)
    assert same == whole
    assert not same.truncated
    [cut] = rows(tokenizer, SHORT, limit=length - 2)
    assert cut == TokenizedRow(whole.input_ids[:-2], whole.labels[:-2], truncated=True)
    assert trained(cut, tokenizer).strip("·") == "cd"


def test_tokenize_row_cut_before_its_answer_is_refused_with_its_line(tokenizer: Any):
    fine, long = SHORT, conversation(*[("user", "x" * 50, False)], ("assistant", "y", True))
    with pytest.raises(PostTrainingError) as error:
        rows(tokenizer, fine, Conversation(long.messages, "rows.jsonl:7"), limit=40)
    assert error.value.where == "rows.jsonl:7"
    assert error.value.problem == "nothing to train on in the first 40 of 72 tokens"


def test_tokenize_template_that_marks_only_some_turns_of_a_row_is_refused(tokenizer: Any):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.content != 'cd' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(PostTrainingError) as error:
        rows(tokenizer, TWO_TURNS, name="model")
    assert str(error.value) == "rows.jsonl:1: chat template 'model' marks 1 of 2 assistant turns"


def test_tokenize_tokenizer_with_offsets_beside_the_text_is_refused(tokenizer: Any):
    from tokenizers import normalizers

    # Offsets are those of the text before the normaliser; this one has no idea of them.
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("first-answer", "other-answer")
    with pytest.raises(PostTrainingError, match="offsets don't mark the trained turns"):
        rows(tokenizer, SHORT)


texts = st.text(min_size=1).filter(str.strip)


@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), trim=st.booleans())
def test_tokenize_any_text_trains_exactly_the_answers(turns: list[tuple[str, str]], trim: bool):
    from tokenizers import processors

    from post_training.models.create import train_tokenizer

    tokenizer = train_tokenizer(
        ["some merges  some merges\n\n"] * 4, 280, ("<|im_start|>", "<|im_end|>"), ""
    )
    if trim:  # offsets without the spaces around a word, as in Llama 3
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [
        message
        for question, answer in turns
        for message in (("user", question, False), ("assistant", answer, True))
    ]
    [row] = rows(tokenizer, conversation(*messages))
    answers = "".join(f"{answer}<|im_end|>" for _, answer in turns)
    labels = [label for label in row.labels if label != IGNORED]
    assert tokenizer.decode(labels).encode() == answers.encode()


def test_tokenize_token_across_the_start_of_an_answer_is_trained(tokenizer: Any):
    from post_training.models.create import train_tokenizer

    markers = ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(["\n\n"] * 9, 262, markers, chat_template="")
    [row] = rows(tokenizer, conversation(("user", "ab", False), ("assistant", "\n\ncd", True)))
    # Of the three newlines the first is the template's; it makes one token with the second.
    assert trained(row, tokenizer).strip("·") == "\n\n\ncd<|im_end|>"
