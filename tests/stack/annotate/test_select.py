"""`entrypoint select`: preference rows that the data layer reads, and what is told of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.branch_rows import branch, data, prompt_row
from helpers.dpo_runs import dpo
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import metrics
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.data.config import DatasetConfig
from post_training.data.formats.recognise import parse, recognise
from post_training.models.reference import Reference

PROMPT_IDS = [5, 6, 7]


def sampled(value: float, **more: Any) -> dict[str, Any]:
    ids = [10 + int(value), 9]
    figures = {"completion_token_ids": ids, "completion_ref_logprob": -value - 1}
    figures |= {"completion_length": 2, "finish_reason": "stop", "rewards": {"right": value}}
    return branch(f"answer {value}", **{**figures, **more})


def rows(number: int = 20) -> list[dict[str, Any]]:
    return [
        prompt_row(
            f"p{n}",
            f"question {n}",
            [sampled((n * 3 + 2 * index) % 7) for index in range(6)],
            prompt_token_ids=PROMPT_IDS,
        )
        for n in range(number)
    ]


def select(run_dir: Path, path: Path, **more: Any) -> list[dict[str, Any]]:
    settings = {"data": data(path, num_workers=more.pop("num_workers", 1)), **more}
    run_stage("select", settings, run_dir)
    return read_rows(run_dir / "dataset/pairs.jsonl")


def test_select_writes_all_that_training_needs(tmp_path: Path):
    row = prompt_row(
        "a", "1 + 1?", [sampled(0.0), sampled(3.0), sampled(2.0)], prompt_token_ids=PROMPT_IDS
    )
    row["system_prompt"] = {"content": "be brief"}
    [pair] = select(tmp_path / "run", write_rows(tmp_path / "rows.jsonl", [row]))
    assert pair == {
        "conversation_id": "a",
        "source": "sums",
        "prompt": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "1 + 1?"},
        ],
        "chosen": [{"role": "assistant", "content": "answer 3.0"}],
        "rejected": [{"role": "assistant", "content": "answer 0.0"}],
        "prompt_token_ids": PROMPT_IDS,
        "chosen_token_ids": [13, 9],
        "ref_chosen_logprob": -4.0,
        "chosen_reward": 3.0,
        "chosen_quantile_reward": 1.0,
        "chosen_length": 2,
        "chosen_is_truncated": False,
        "rejected_token_ids": [10, 9],
        "ref_rejected_logprob": -1.0,
        "rejected_reward": 0.0,
        "rejected_quantile_reward": 1 / 3,
        "rejected_length": 2,
        "rejected_is_truncated": False,
        "ref_rewards": [0.0, 3.0, 2.0],
    }


def test_select_pairs_are_read_back_as_preferences(tmp_path: Path):
    call = {"type": "function-call", "name": "add", "args": '{"a": 1}'}
    calling = {
        "messages": [
            {
                "role": "assistant",
                "parts": [
                    {"type": "thought", "content": "add them"},
                    call,
                    {"type": "function-output", "content": "2"},
                    {"type": "response", "content": "It is 2."},
                ],
            }
        ],
        "is_reference_completion": True,
        "rewards": {"right": 1},
    }
    row = prompt_row("a", "1 + 1?", [calling, branch("3", rewards={"right": 0})])
    row["available_functions"] = [{"name": "add", "parameters": {}}]
    [pair] = select(tmp_path / "run", write_rows(tmp_path / "rows.jsonl", [row]))
    found = recognise(pair, DatasetConfig(path="x.jsonl"), "x.jsonl:1")
    [preference] = parse(pair, found, train_on="all_turns", train_on_thoughts=True)
    assert [(m.role, m.content, m.thought) for m in preference.chosen] == [
        ("assistant", "", "add them"),
        ("tool", "2", None),
        ("assistant", "It is 2.", None),
    ]
    assert preference.chosen[0].tool_calls[0].name == "add"
    assert [m.content for m in preference.rejected] == ["3"]
    assert [json.loads(tool)["function"]["name"] for tool in preference.tools] == ["add"]
    assert preference.figures["chosen_reward"] == 1.0


def test_select_takes_the_samples_asked_for_and_quantiles_of_the_references(tmp_path: Path):
    branches = [
        branch("best", is_reference=False, rewards={"right": 9}),
        branch("worst", is_reference=False, rewards={"right": -9}),
        branch("good", rewards={"right": 2}),
        branch("bad", rewards={"right": 1}),
    ]
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("a", "?", branches)])
    for samples, sides in (
        ("reference", ("good", "bad")),
        ("offline", ("best", "worst")),
        ("both", ("best", "worst")),
    ):
        [pair] = select(tmp_path / samples, path, samples=samples)
        assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == sides
        assert pair["ref_rewards"] == [2, 1]
    assert (pair["chosen_quantile_reward"], pair["rejected_quantile_reward"]) == (1.0, 0.0)


def test_select_leaves_truncated_samples_out_but_counts_their_rewards(tmp_path: Path):
    branches = [sampled(5, finish_reason="length"), sampled(3), sampled(1)]
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("a", "?", branches)])
    [pair] = select(tmp_path / "without", path)
    assert (pair["chosen_reward"], pair["ref_rewards"]) == (3, [5, 3, 1])
    [pair] = select(tmp_path / "with", path, exclude_truncated=False)
    assert (pair["chosen_reward"], pair["chosen_is_truncated"]) == (5, True)


def test_select_bytes_do_not_depend_on_workers_or_the_order_of_other_prompts(tmp_path: Path):
    # Large enough for several chunks.
    many = [{**row, "filler": "x" * 20000} for row in rows(400)]
    path = write_rows(tmp_path / "rows.jsonl", many)
    settings = {"strategy": {"name": "random", "num_pairs": 2}, "seed": 3}
    one = select(tmp_path / "one", path, num_workers=1, **settings)
    select(tmp_path / "three", path, num_workers=3, **settings)
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "three")
    backwards = write_rows(tmp_path / "backwards.jsonl", many[::-1])
    others = select(tmp_path / "backwards", backwards, **settings)
    by_id = {pair["conversation_id"]: pair for pair in others}
    source = {"source": "sums"}
    assert all({**by_id[pair["conversation_id"]], **source} == pair for pair in one)
    assert {pair["conversation_id"] for pair in one} >= {"p0", "p0/1"}


def test_select_carries_the_reference_on_and_refuses_two(tmp_path: Path):
    reference = Reference("a" * 64, "b" * 64, "c" * 64, "float32")
    one = write_rows(tmp_path / "one/rows.jsonl", rows(3))
    other = write_rows(tmp_path / "other/rows.jsonl", rows(3))
    reference.write(one.parent)
    select(tmp_path / "run", one)
    assert Reference.read(tmp_path / "run/dataset") == reference
    both = {"datasets": [{"path": str(one)}, {"path": str(other)}]}
    with pytest.raises(UsageError, match=r"models or backends, or one has no reference\.json"):
        run_stage("select", {"data": both}, tmp_path / "both")


def test_select_reports_distributions_and_why_prompts_have_no_pair(tmp_path: Path, capsys):
    same = prompt_row("same", "?", [sampled(1), sampled(1)])
    near = prompt_row("near", "?", [sampled(1), sampled(1.5)])
    alone = prompt_row("alone", "?", [sampled(1)])
    offline = prompt_row("none", "?", [branch("x", is_reference=False, rewards={"right": 1})])
    path = write_rows(tmp_path / "rows.jsonl", [*rows(10), same, near, alone, offline])
    select(tmp_path / "run", path, strategy={"name": "margin", "min_margin": 1})
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    assert report["prompts_without_a_pair"] == {
        "equal-rewards": 1, "no-pair": 1, "few-candidates": 1, "few-references": 1
    }  # fmt: skip
    margins = report["distributions"]["margin of the rewards"]
    assert margins["number"] == sum(margins["histogram"]["counts"]) == 10
    assert margins["least"] > 0
    assert report["distributions"]["reward, reference samples"]["number"] == 60
    told = capsys.readouterr().err
    assert "4 prompts without a pair: 1: all branches to choose from have the same reward" in told
    assert "margin of the rewards" in told


def test_select_pair_with_an_empty_sample_trains_its_end_token(tmp_path: Path, model: Path):
    silent = sampled(0, completion_token_ids=[9])
    silent["messages"][0]["parts"][0]["content"] = ""
    row = prompt_row("a", "?", [sampled(3), silent], prompt_token_ids=PROMPT_IDS)
    select(tmp_path / "pairs", write_rows(tmp_path / "rows.jsonl", [row]))
    config = {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml",
                 "datasets": [{"path": str(tmp_path / "pairs/dataset/pairs.jsonl")}]},
        "dpo": {},
        "loss": {"name": "dpo", "beta": 0.1},
        "reference": {"logprobs": "computed"},
        "training": {"max_steps": 1, "effective_batch_size": 1, "learning_rate": 0.001},
    }  # fmt: skip
    dpo(config, tmp_path / "run")
    [line] = metrics(tmp_path / "run")
    assert (line["lengths/chosen"], line["lengths/rejected"]) == (2, 1)
    assert line["logps/rejected"] < 0


@pytest.mark.parametrize(
    ("branches", "problem"),
    [
        ([branch("x"), branch("y")], r"\[0\].rewards: there are none; run `entrypoint rewards`"),
        ([sampled(1, rewards={"a": 1, "b": 2})] * 2, "several, so the setting `reward`"),
        ([sampled(1, rewards={"a": None})] * 2, "no number 'a'"),
    ],
)
def test_select_without_the_reward_says_so(branches, problem: str, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("a", "?", branches)])
    with pytest.raises(PostTrainingError, match=problem):
        select(tmp_path / "run", path)
    assert not (tmp_path / "run/dataset").exists()


def test_select_without_one_pair_fails(tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("a", "?", [sampled(1), sampled(1)])])
    with pytest.raises(PostTrainingError, match="not one pair from 1 prompts: 1: all branches to"):
        select(tmp_path / "run", path)


def test_select_says_how_many_samples_were_cut_off_and_the_setting(tmp_path: Path, capsys):
    cut = [sampled(value, finish_reason="length") for value in (0.0, 3.0)]
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("a", "1 + 1?", cut)])
    with pytest.raises(PostTrainingError, match="fewer than two branches") as error:
        select(tmp_path / "none", path)
    told = "2 samples, 2 cut off at max_tokens: left out (exclude_truncated)"
    assert str(error.value.hint).startswith(told)
    row = prompt_row("a", "1 + 1?", [*cut, sampled(1.0), sampled(2.0)])
    select(tmp_path / "some", write_rows(tmp_path / "rows.jsonl", [row]))
    assert "4 samples, 2 cut off at max_tokens: left out" in capsys.readouterr().err
    select(tmp_path / "all", path, exclude_truncated=False)
    assert "cut off" not in capsys.readouterr().err


def test_select_records_what_it_read_of_the_rows_and_what_not(tmp_path: Path):
    row = prompt_row("a", "1 + 1?", [sampled(0.0, mood="good"), sampled(3.0)])
    select(tmp_path / "run", write_rows(tmp_path / "rows.jsonl", [row]))
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    read = {each["name"]: each["read_as"] for each in counts["sources"][0]["columns"]}
    assert read["conversation_id"] == "id"
    assert read["conversation_branches[].rewards"] == "figure"
    assert read["conversation_branches[].mood"] is None
    assert counts["sources"][0]["num_rows"] == 1
