"""Branches within the limit stay, with their lengths; prompts with too few of them go."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.row_files import read_rows
from post_training.core.errors import PostTrainingError
from post_training.models.load import load_tokenizer


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    """Prompts with answers of 1, 30 and 60 characters; the third has the short one alone."""

    def branch(text: str) -> dict[str, Any]:
        return {"messages": [{"role": "assistant", "content": text}], "kept": len(text)}

    rows = [
        {
            "conversation_id": f"prompt {n}",
            "initial_prompt": {"role": "user", "content": f"{n}?"},
            "conversation_branches": [branch("x"), branch("y" * 30), branch("z" * 60)][: 3 - n],
        }
        for n in range(3)
    ]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def filtered(model: Path, data: Path, run_dir: Path, **settings: Any) -> Any:
    config = {
        "tokenizer": str(model),
        "data": {"chat_template": "chatml", "datasets": [{"path": str(data)}]},
        "chunk_rows": 2,
        **settings,
    }
    return run_stage("filter", config, run_dir)


def test_filter_drops_long_branches_and_records_lengths(model, conversations, tmp_path):
    tokenizer = load_tokenizer(model)
    limit = 60
    result = filtered(model, conversations, tmp_path / "run", max_sequence_length=limit)
    rows = read_rows(tmp_path / "run")
    assert [len(row["conversation_branches"]) for row in rows] == [2, 2, 1]
    assert result.metrics["num_branches"] == 5
    for row in rows:
        user = {"role": "user", "content": row["initial_prompt"]["content"]}
        for branch in row["conversation_branches"]:
            answer = {"role": "assistant", "content": branch["messages"][0]["content"]}
            ids = tokenizer.apply_chat_template([user, answer], return_dict=False)
            prompt = tokenizer.apply_chat_template(
                [user], return_dict=False, add_generation_prompt=True
            )
            assert branch["num_tokens"] == len(ids) <= limit
            assert row["prompt_length"] == len(prompt)
            # The end of the turn is trained; the newline after it is not.
            assert branch["completion_length"] == len(ids) - len(prompt) - 1
            assert branch["is_reference_completion"] is False
            assert branch["kept"] == len(branch["messages"][0]["content"])


def test_filter_leaves_out_prompts_with_fewer_branches_than_asked(model, conversations, tmp_path):
    settings = {"max_sequence_length": 60, "min_branches": 2}
    result = filtered(model, conversations, tmp_path / "run", **settings)
    assert [row["conversation_id"] for row in read_rows(tmp_path / "run")] == [
        "prompt 0",
        "prompt 1",
    ]
    assert result.metrics["num_rejected"] == 1
    counts = json.loads((tmp_path / "run/dataset/counts.json").read_text())
    del counts["sources"]
    assert counts == {"num_rows": 2, "num_branches": 4, "rejected": {"filtered": 1}}


def test_filter_limit_may_be_reached_by_a_branch_and_not_by_a_prompt(
    model, conversations, tmp_path
):
    """A prompt of as many tokens would leave no room for an answer."""
    filtered(model, conversations, tmp_path / "all", max_sequence_length=1000)
    first = read_rows(tmp_path / "all")[0]
    lengths = [branch["num_tokens"] for branch in first["conversation_branches"]]
    filtered(model, conversations, tmp_path / "branch", max_sequence_length=lengths[1])
    assert len(read_rows(tmp_path / "branch")[0]["conversation_branches"]) == 2
    settings = {"max_sequence_length": first["prompt_length"], "min_branches": 0}
    with pytest.raises(PostTrainingError, match="too-long"):
        filtered(model, conversations, tmp_path / "prompt", **settings)


def test_filter_keeps_prompts_without_branches_where_none_is_needed(model, tmp_path):
    data = tmp_path / "prompts.jsonl"
    prompts = [{"messages": [{"role": "user", "content": "?" * n}]} for n in (5, 50)]
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    settings = {"max_sequence_length": 40, "min_branches": 0}
    filtered(model, data, tmp_path / "run", **settings)
    assert [row["initial_prompt"]["content"] for row in read_rows(tmp_path / "run")] == ["?????"]
