"""Two answers to one prompt, and the figures beside them."""

from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.parse import parse
from post_training.data.formats.recognise import recognise
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, BadRow, Message, Preference

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
OTHER = {"role": "assistant", "content": "3"}
ASKED = Message("user", "1 + 1?")
ANSWERED = Message("assistant", "2", COMPLETION)
OTHERWISE = Message("assistant", "3", COMPLETION)


def preference_of(row: dict[str, Any], *, train_on_thoughts: bool = True) -> Preference:
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    [row] = parse(row, found, train_on="all_turns", train_on_thoughts=train_on_thoughts)
    assert isinstance(row, Preference)
    return row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"prompt": "1 + 1?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    ],
)
def test_preference_prompt_is_given_or_common(row: dict[str, Any]):
    assert preference_of(row) == Preference((ASKED,), (ANSWERED,), (OTHERWISE,))


IDS = {"prompt_token_ids": [5, 6], "chosen_token_ids": [7, 4], "rejected_token_ids": [4]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "", **IDS},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{**OTHER, "content": ""}], **IDS},
    ],
)
def test_preference_answer_may_be_empty_beside_the_ids_that_were_sampled(row: dict[str, Any]):
    preference = preference_of(row)
    assert preference.rejected == (Message("assistant", "", COMPLETION),)
    assert preference.figures["rejected_token_ids"] == [4]
    for missing in ("prompt_token_ids", "rejected_token_ids"):
        with pytest.raises(BadRow, match="is empty"):
            preference_of({name: cell for name, cell in row.items() if name != missing})


def test_preference_common_prompt_may_hold_whole_turns():
    start = [{"role": "system", "content": "be brief"}, USER, ASSISTANT, USER]
    row = {"chosen": [*start, ASSISTANT], "rejected": [*start, OTHER]}
    preference = preference_of(row)
    assert preference.prompt == (
        Message("system", "be brief"),
        ASKED,
        Message("assistant", "2", PROMPT),
        ASKED,
    )
    assert preference.chosen == (ANSWERED,)


def test_preference_keeps_the_figures_beside_it():
    figures = {
        "ref_chosen_logprob": -3.5,
        "chosen_reward": 1,
        "rejected_rewards": [0.5, 1],
        "prompt_token_ids": [3, 4],
        "chosen_is_truncated": False,
        "ref_rewards": [],
    }
    row = {"prompt": "?", "chosen": "2", "rejected": "3", "chosen_model": "m", "score": 1}
    preference = preference_of(row | figures)
    del figures["ref_rewards"]
    assert preference.figures == figures


def test_preference_thoughts_can_be_left_untrained():
    thinking = {**ASSISTANT, "thinking": "easy"}
    row = {"prompt": [USER], "chosen": [thinking], "rejected": [OTHER]}
    assert preference_of(row).chosen == (Message("assistant", "2", COMPLETION, thought="easy"),)
    assert preference_of(row, train_on_thoughts=False).chosen == (
        Message("assistant", "", EXCLUDED, thought="easy"),
        ANSWERED,
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "2"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "2", **IDS, "rejected_token_ids": [7, 4]},
    ],
)
def test_preference_of_one_answer_twice_trains_nothing_in_any_form(row: dict[str, Any]):
    with pytest.raises(BadRow) as bad:
        preference_of(row)
    assert (bad.value.reason, bad.value.problem) == (
        "untrained",
        "chosen and rejected are the same",
    )


def test_preference_of_answers_that_differ_by_a_space_or_in_their_tokens_is_kept():
    assert preference_of({"prompt": "1 + 1?", "chosen": "2", "rejected": "2 "})
    assert preference_of({"prompt": "1 + 1?", "chosen": "2", "rejected": "2", **IDS})


@pytest.mark.parametrize(("beside", "said"), [("1 + 1?", "1 + 1? "), ("1\n+ 1?", "1\r\n+ 1?")])
def test_preference_prompt_beside_may_differ_in_white_space(beside: str, said: str):
    start = [{"role": "user", "content": said}]
    preference = preference_of(
        {"prompt": beside, "chosen": [*start, ASSISTANT], "rejected": [*start, OTHER]}
    )
    assert preference.prompt == (Message("user", said),)
