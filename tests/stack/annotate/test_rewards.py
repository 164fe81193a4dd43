"""`entrypoint rewards`: models by their own template, functions by name; no reward by mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForSequenceClassification,
)

from helpers.annotation_stages import run_stage
from helpers.branch_rows import branch, data, prompt_row
from helpers.real_data import GSM8K, needs_gsm8k
from helpers.row_files import read_rows, write_rows
from helpers.stage_process import start_entrypoint
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.config import FunctionLimits
from post_training.data.rewards import find_reward
from post_training.models.score import RewardScorer

REPOSITORY = Path(__file__).parents[3]
FINAL_NUMBER = REPOSITORY / "reproducibility/gsm8k-alignment/final_number.py"
# Without marks, as reward models have it; it knows no system messages.
PLAIN = (
    "{% for m in messages if m.role != 'system' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def reward_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model, num_labels=1)
    folder = tmp_path_factory.mktemp("reward") / "model"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(folder)
    return folder


def with_template(reward_model: Path, template: str) -> None:
    (reward_model / "chat_template.jinja").write_text(template)


def rows(number: int = 5) -> list[dict[str, Any]]:
    return [
        prompt_row(
            f"p{n}",
            f"What is {n} + {n}?",
            [branch(f"It is {value}." + "!" * value) for value in range(n + 1)],
            original_metadata={"answer": f"#### {2 * n}"},
        )
        for n in range(number)
    ]


def judged(run_dir: Path, path: Path, *rewards: dict[str, Any], **more: Any) -> list[dict]:
    settings = {"data": data(path), "rewards": list(rewards), "chunk_rows": 2, "num_threads": 1}
    run_stage("rewards", {**settings, **more}, run_dir)
    return read_rows(run_dir)


def rewards_of(rows: list[dict[str, Any]]) -> list[list[dict[str, float]]]:
    return [[each["rewards"] for each in row["conversation_branches"]] for row in rows]


def test_rewards_of_a_model_are_those_of_its_own_forward(reward_model, tmp_path: Path):
    exact = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    path = write_rows(tmp_path / "rows.jsonl", rows())
    found = judged(tmp_path / "run", path, {"name": "rm", "model": {"path": str(reward_model)}})
    for row, own in zip(rows(), rewards_of(found), strict=True):
        assert len(own) == len(row["conversation_branches"])
        for each, rewards in zip(row["conversation_branches"], own, strict=True):
            messages = [
                {"role": "user", "content": row["initial_prompt"]["content"]},
                {"role": "assistant", "content": each["messages"][0]["parts"][0]["content"]},
            ]
            inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                expected = float(exact(**inputs).logits[0, 0])
            assert rewards["rm"] == pytest.approx(expected, abs=1e-5)


def test_rewards_of_a_conversation_that_ends_in_padding_are_transformers_own(reward_model):
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    pad = model.config.pad_token_id
    ids = [[9, 10, 11, 12, pad, pad], [9, 10, 13, pad, 14, 15]]
    [found] = RewardScorer(model, max_batch_tokens=99, prompts_per_batch=1).score([ids])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(ids)).logits[:, 0].tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_rewards_record_has_the_means_of_sampled_and_other_branches(tmp_path: Path):
    branches = [
        branch("#### 4"), branch("#### 5"), branch("#### 4"), branch("#### 4", is_reference=False),
    ]  # fmt: skip
    row = prompt_row("p", "What is 2 + 2?", branches, original_metadata={"answer": "#### 4"})
    settings = {
        "data": data(write_rows(tmp_path / "rows.jsonl", [row])),
        "functions": [str(FINAL_NUMBER)],
        "rewards": [{"name": "right", "function": "final_number"}],
    }
    metrics = run_stage("rewards", settings, tmp_path / "run").metrics
    assert (metrics["right"], metrics["right/offline"]) == (pytest.approx(2 / 3), 1.0)


def test_rewards_bytes_do_not_depend_on_the_chunks(reward_model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows())
    reward = {"name": "rm", "model": {"path": str(reward_model)}}
    whole = judged(tmp_path / "whole", path, reward, chunk_rows=100)
    assert judged(tmp_path / "single", path, reward, chunk_rows=1) == whole


def test_rewards_of_several_judges_stand_beside_each_other(reward_model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows(3))
    right = {"name": "right", "function": "final_number"}
    model = {"name": "rm", "model": {"path": str(reward_model)}}
    functions = [str(FINAL_NUMBER)]
    both = judged(tmp_path / "both", path, right, model, functions=functions)
    assert [[each["right"] for each in own] for own in rewards_of(both)] == [[1], [0, 0], [0, 0, 0]]
    alone = judged(tmp_path / "one", path, model)
    then = judged(tmp_path / "two", tmp_path / "one", right, functions=functions)
    assert [[sorted(each.items()) for each in own] for own in rewards_of(then)] == [
        [sorted(each.items()) for each in own] for own in rewards_of(both)
    ]
    assert rewards_of(alone) == [[{"rm": each["rm"]} for each in own] for own in rewards_of(both)]
    with pytest.raises(PostTrainingError, match="there is a reward 'rm' already"):
        judged(tmp_path / "again", tmp_path / "one", model)


@needs_gsm8k
def test_final_number_agrees_with_gsm8ks_own_verdicts():
    reward = find_reward("final_number", [FINAL_NUMBER], FunctionLimits())
    number = 0
    for line in (GSM8K / "example_model_solutions.jsonl").open():
        row = json.loads(line)
        source = {"original_metadata": {"answer": row["ground_truth"]}}
        found = [each for each in row.values() if isinstance(each, dict)]
        number += len(found)
        answers = [each["solution"] for each in found]
        [judged] = reward([answers], [source], str)
        assert judged == [each["is_correct"] for each in found]
    assert number == 4 * 1319


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            "{% for m in messages %}{{ m }}{% endfor %}",
            r"writes the messages' structure .*\('role'\)",
        ),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "messages of another structure"),
        ("{{ messages.system.content }}", "it can't be rendered"),
        ("{{ strftime_now('%d') }}{{ messages[0].content }}", "writes today's date"),
    ],
)
def test_rewards_by_a_template_of_another_structure_are_refused(
    template, problem, reward_model, tmp_path: Path
):
    path = write_rows(tmp_path / "rows.jsonl", rows(1))
    with_template(reward_model, template)
    try:
        with pytest.raises(PostTrainingError, match=problem):
            judged(tmp_path / "run", path, {"name": "rm", "model": {"path": str(reward_model)}})
    finally:
        with_template(reward_model, PLAIN)


def test_rewards_of_a_row_that_the_template_cuts_short_are_refused(reward_model, tmp_path: Path):
    row = {**rows(1)[0], "system_prompt": {"content": "answer in words"}}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(PostTrainingError, match="leaves out a part: 'answer in words'"):
        judged(tmp_path / "run", path, {"name": "rm", "model": {"path": str(reward_model)}})


def test_rewards_of_what_is_too_long_are_refused_or_marked(reward_model, tmp_path: Path):
    row = prompt_row("a", "What?", [branch("short"), branch("long" * 20)])
    path = write_rows(tmp_path / "rows.jsonl", [row])
    reward = {"name": "rm", "model": {"path": str(reward_model)}, "max_seq_length": 40}
    with pytest.raises(PostTrainingError, match=r"a: reward rm: .* \(the limit is 40\)"):
        judged(tmp_path / "refused", path, reward)
    [found] = judged(tmp_path / "marked", path, {**reward, "overlong": "mark"})
    short, long = found["conversation_branches"]
    assert "reward_is_truncated" not in short
    assert long["reward_is_truncated"] == {"rm": True}
    assert long["rewards"]["rm"] != short["rewards"]["rm"]


def test_rewards_of_a_language_model_are_refused(model, tmp_path: Path):
    path = write_rows(tmp_path / "rows.jsonl", rows(1))
    with pytest.raises(PostTrainingError, match="not a reward model: its architecture is Llama"):
        judged(tmp_path / "run", path, {"name": "rm", "model": {"path": str(model)}})


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("return 'good'", r"must return a finite number \(got 'good'\)"),
        ("return float('nan')", r"must return a finite number \(got nan\)"),
        ("return row['nothing']", r"p0: reward x: functions\.py:4: KeyError: 'nothing'"),
        ("raise SystemExit(0)", r"reward 'x' of functions\.py must return or raise an Exception"),
        ("__import__('os')._exit(0)", r"reward 'x' of functions\.py ended its process with exit"),
    ],
)
def test_rewards_of_a_function_that_gives_no_number_say_so(code, problem, tmp_path: Path):
    file = tmp_path / "functions.py"
    file.write_text(
        "from post_training.data.rewards import register_reward\n"
        f"@register_reward('x')\ndef x(answer, row):\n    {code}\n"
    )
    path = write_rows(tmp_path / "rows.jsonl", rows(1))
    reward = {"name": "x", "function": "x"}
    with pytest.raises(PostTrainingError, match=problem):
        judged(tmp_path / "run", path, reward, functions=[str(file)])
    with pytest.raises(UsageError, match="unknown name 'y'"):
        judged(tmp_path / "y", path, {**reward, "function": "y"}, functions=[str(file)])


def test_rewards_of_a_model_spread_over_two_ranks_are_those_of_a_whole_one(
    reward_model, tmp_path: Path
):
    path = write_rows(tmp_path / "rows.jsonl", rows())
    reward = {"name": "rm", "model": {"path": str(reward_model)}}
    whole = rewards_of(judged(tmp_path / "whole", path, reward))
    settings = {"data": data(path), "rewards": [reward], "num_threads": 1}
    settings |= {"tensor_parallel_size": 2, "num_processes": 2, "run_dir": str(tmp_path / "spread")}
    (tmp_path / "rewards.yaml").write_text(json.dumps(settings))
    command = ["rewards", str(tmp_path / "rewards.yaml"), "--unpinned"]
    process = start_entrypoint(command, tmp_path / "log")
    process.join(timeout=120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    spread = rewards_of(read_rows(tmp_path / "spread"))
    assert [[each["rm"] for each in row] for row in spread] == [
        pytest.approx([each["rm"] for each in row], abs=1e-5) for row in whole
    ]
