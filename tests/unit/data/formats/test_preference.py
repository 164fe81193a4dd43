"""Two answers to one prompt, and the figures beside them."""

from collections import Counter
from typing import Any

import pytest

from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT, BadRow, Message, Preference

USER = {"role": "user", "content": "1 + 1?"}
ASSISTANT = {"role": "assistant", "content": "2"}
OTHER = {"role": "assistant", "content": "3"}
ASKED = Message("user", "1 + 1?")
ANSWERED = Message("assistant", "2", COMPLETION)
OTHERWISE = Message("assistant", "3", COMPLETION)


def preference_of(
    row: dict[str, Any], *, train_on_thoughts: bool = True, **settings: Any
) -> Preference:
    found = recognise(row, DatasetConfig(path="rows.jsonl", **settings), "rows.jsonl:1")
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


@pytest.mark.parametrize(
    ("column", "figure", "problem"),
    [
        ("ref_chosen_logprob", "-3.2", "must be a finite number (got '-3.2')"),
        ("ref_rejected_logprob", [-3.2, "-1"], "must be a finite number (got [-3.2, '-1'])"),
        ("chosen_reward", True, "must be a finite number (got true)"),
        ("rejected_quantile_reward", {"a": 1}, "must be a finite number (got {a: 1})"),
        ("ref_rewards", [0.5, None], "must be a list of finite numbers (got [0.5, null])"),
        ("ref_rewards", "[0.5]", "must be a list of finite numbers (got '[0.5]')"),
        ("chosen_token_ids", ["7"], "must be a list of finite numbers (got ['7'])"),
        ("chosen_is_truncated", "false", "must be true or false (got 'false')"),
        ("rejected_is_truncated", [True], "must be true or false (got [true])"),
    ],
)
def test_preference_figure_that_is_used_and_no_number_is_refused_by_name(
    column: str, figure: Any, problem: str
):
    row = {"prompt": "?", "chosen": "2", "rejected": "3", column: figure}
    with pytest.raises(BadRow) as bad:
        preference_of(row)
    assert (bad.value.reason, bad.value.problem) == ("columns", f"{column}: {problem}")
    assert str(bad.value.hint).endswith(f"ignore: [{column}]")
    assert preference_of(row, ignore=[column]).figures == {}


def test_preference_figure_that_is_empty_or_not_used_is_no_reason():
    row = {"prompt": "?", "chosen": "2", "rejected": "3"}
    empty = {"ref_chosen_logprob": None, "chosen_reward": "", "chosen_is_truncated": None}
    unused = {"chosen_rating": "good", "prompt_ids": ["a"], "ref_model": "m"}
    assert preference_of(row | empty | unused).figures == {}


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


def test_preference_report_calls_a_figure_read_only_where_something_reads_it():
    row = {"prompt": "?", "chosen": "2", "rejected": "3"}
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    assert found.reads("chosen_reward") == found.reads("ref_rewards") == "figure"
    assert found.reads("chosen_rating") is None


ALPACA = {"instruction": "Into German.", "input": "the lake", "chosen": "der See", "rejected": "2"}
ANSWERS = {"chosen": "chosen", "rejected": "rejected"}


def test_preference_prompt_of_an_instruction_and_its_input_is_read_as_the_settings_say():
    columns = {**ANSWERS, "prompt": "instruction", "input": "input"}
    asked = preference_of(ALPACA, columns=columns).prompt
    assert asked == (Message("user", "Into German.\n\nthe lake"),)
    assert preference_of({**ALPACA, "input": ""}, columns=columns).prompt == (
        Message("user", "Into German."),
    )


@pytest.mark.parametrize(
    ("row", "problem", "more"),
    [
        (ALPACA, "column input is not read", "prompt: instruction, input: input}"),
        ({**ALPACA, "input": ""}, "no column of the prompt is named", "prompt: instruction}"),
    ],
)
def test_preference_of_an_instruction_is_refused_with_the_setting_that_reads_it(
    row: dict[str, Any], problem: str, more: str
):
    found = recognise(row, DatasetConfig(path="rows.jsonl"), "rows.jsonl:1")
    with pytest.raises(BadRow, match=problem) as error:
        found.check_columns(row, Counter())
        parse(row, found, train_on="all_turns", train_on_thoughts=True)
    assert f"columns: {{chosen: chosen, rejected: rejected, {more}" in error.value.hint


def test_preference_input_beside_whole_conversations_is_part_of_the_prompt_they_begin_with():
    said = [{**USER, "content": "1 + 1?\n\nIn words."}]
    row = {"prompt": "1 + 1?", "input": "In words.", "chosen": [*said, ASSISTANT],
           "rejected": [*said, OTHER]}  # fmt: skip
    columns = {**ANSWERS, "prompt": "prompt", "input": "input"}
    assert preference_of(row, columns=columns).prompt[0].content == "1 + 1?\n\nIn words."
    with pytest.raises(BadRow, match="prompt: is not what chosen and rejected begin with"):
        preference_of({**row, "input": "In Roman numbers."}, columns=columns)
