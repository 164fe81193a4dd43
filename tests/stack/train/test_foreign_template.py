"""Templates that are not ours, through every stage that reads one: a file, and the model's own.

Qwen3's, which has no marks, leaves out earlier thoughts, and writes tools and calls.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import changed
from post_training.data.prepared.dataset import PreparedDataset
from post_training.models.load import load_tokenizer

pytestmark = pytest.mark.long

QWEN3 = (resources.files("trl") / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
TOOL = {"type": "function", "function": {"name": "now", "description": "t", "parameters": {}}}
CALL = {"id": "a", "type": "function", "function": {"name": "now", "arguments": {"city": "Rome"}}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "two twos"},
            {"role": "user", "content": "3 + 3?"},
            {"role": "assistant", "content": "6", "reasoning_content": "two threes"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "noon", "tool_call_id": "a"},
            {"role": "assistant", "content": "It is noon."},
        ],
        "tools": [TOOL],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "qwen3.jinja").write_text(QWEN3, encoding="utf-8")
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def long_model(init_model: Any, folder: Path) -> Path:
    return init_model(folder / "init", max_position_embeddings=2048)


def config(model: Path, data: Path, template: str) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {"chat_template": template, "datasets": [{"path": str(data)}], "num_workers": 1},
        "training": {"max_steps": 2, "effective_batch_size": 2, "learning_rate": 0.001},
        "checkpointing": {"save_steps": 2},
        "num_threads": 1,
        "seed": 7,
    }


@pytest.fixture(scope="module")
def trained(long_model: Path, folder: Path) -> Path:
    """The run folder of sft by the file."""
    settings = config(long_model, folder / "rows.jsonl", str(folder / "qwen3.jinja"))
    run_stage("sft", {**settings, "sft": {"max_seq_length": 1024}}, folder / "sft")
    return folder / "sft"


def served(tokenizer: Any, row: dict[str, Any], number: int, **settings: Any) -> str:
    return tokenizer.apply_chat_template(
        row["messages"][:number],
        tools=row.get("tools"),
        tokenize=False,
        add_generation_prompt=True,
        **settings,
    )


def test_sft_trains_after_what_its_saved_model_is_served(trained: Path):
    tokenizer = load_tokenizer(trained / "model")
    assert tokenizer.chat_template == QWEN3
    dataset = PreparedDataset.open(trained / "data")
    texts = [tokenizer.decode(dataset.read(row).ids) for row in range(len(dataset))]
    thoughts, tools = ROWS
    expected = [
        (served(tokenizer, thoughts, 1, enable_thinking=True), "4"),
        (served(tokenizer, thoughts, 3, enable_thinking=True), "6"),
        (served(tokenizer, tools, 1), "now"),
        (served(tokenizer, tools, 3), "It is noon."),
    ]
    # Qwen3 leaves out the thought of an earlier turn, and the empty thought of an earlier call.
    assert len(texts) == 4
    for prompt, answer in expected:
        assert any(t.startswith(prompt) and answer in t[len(prompt) :] for t in texts), prompt


def test_prepared_data_depends_on_what_becomes_of_earlier_thoughts(
    trained: Path, long_model: Path, folder: Path
):
    settings = config(long_model, folder / "rows.jsonl", str(folder / "qwen3.jinja"))
    kept = changed(settings, **{"data.history_thoughts": "keep"})
    run_stage("sft", {**kept, "sft": {"max_seq_length": 1024}}, folder / "kept")
    records = [json.loads((run / "data/prepared.json").read_text()) for run in
               (trained, folder / "kept")]  # fmt: skip
    assert [record["counts"]["num_sequences"] for record in records] == [4, 2]
    assert records[0]["identity"] != records[1]["identity"]
    assert records[0]["sources"][0]["history"] == {
        "num_rows_in_several": 2,
        "num_sequences_of_them": 4,
        "num_thoughts_left_out": 1,
    }


def test_generate_and_dpo_go_on_from_what_a_server_sends(trained: Path, folder: Path):
    """`model`: by the template that sft saved."""
    tokenizer = load_tokenizer(trained / "model")
    prompts = [{"prompt": row["messages"][:1], **_tools(row)} for row in ROWS]
    write_rows(folder / "prompts.jsonl", prompts)
    own = {"path": str(folder / "prompts.jsonl"), "format": "prompt"}
    run_stage(
        "generate",
        {
            "model": {"path": str(trained / "model")},
            "data": {"chat_template": "model", "datasets": [own], "num_workers": 1},
            "sampling": {"n": 2, "max_tokens": 6},
            "num_threads": 1,
            "seed": 5,
        },
        folder / "generate",
    )
    for row, sampled in zip(ROWS, read_rows(folder / "generate"), strict=True):
        expected = tokenizer.encode(served(tokenizer, row, 1), add_special_tokens=False)
        assert sampled["prompt_token_ids"] == expected
        assert len(sampled["conversation_branches"]) == 2

    pairs = [
        {
            "prompt": row["messages"][:1],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad one"}],
            **_tools(row),
        }
        for row in ROWS
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    settings = config(trained / "model", folder / "pairs.jsonl", "model")
    run_stage("dpo", {**settings, "dpo": {}, "loss": {"name": "dpo", "beta": 0.1}}, folder / "dpo")
    assert load_tokenizer(folder / "dpo/model").chat_template == QWEN3


def _tools(row: dict[str, Any]) -> dict[str, Any]:
    return {"tools": row["tools"]} if "tools" in row else {}
