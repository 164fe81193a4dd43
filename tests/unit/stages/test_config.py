"""What every stage's configuration refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from post_training.config.load import load_config
from post_training.config.model import Role, recipe_hash, settings_by_role
from post_training.core.errors import ConfigError
from post_training.stages.config import StageConfig
from post_training.stages.registry import STAGES, find_stage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("seed", "limit"),
    [("-1", ">= 0"), ("4294967296", "<= 4294967295"), (f"1{'0' * 23}", "<= 4294967295")],
)
def test_seed_out_of_range_is_refused_with_file_line_and_range(
    stage: str, seed: str, limit: str, tmp_path: Path
):
    path = tmp_path / "cfg.yaml"
    path.write_text(f"num_threads: 1\nseed: {seed}\n")
    with pytest.raises(ConfigError) as raised:
        load_config(find_stage(stage).load_config_class(), path)
    assert f"{path}:2: seed: must be {limit} (got {seed})" in raised.value.faults


def test_seed_at_the_end_of_the_range_is_taken():
    assert StageConfig(seed=2**32 - 1).seed == 2**32 - 1


DATASETS = {"datasets": [{"path": "a.jsonl"}, {"path": "b.jsonl", "name": "b"}]}
TEMPLATED = {**DATASETS, "chat_template": "chatml"}
MODEL = {"path": "model"}
TRAINING = {"effective_batch_size": 4, "learning_rate": 0.001, "max_steps": 10}
SEQUENCES = {"max_seq_length": 64}
REWARD = {"name": "right", "function": "exact"}
SETTINGS: dict[str, Any] = {
    "mix": {"data": DATASETS},
    "split": {"data": DATASETS, "eval_size": 10},
    "select": {"data": DATASETS},
    "tokenize": {"inputs": ["a.jsonl"], "tokenizer": "t"},
    "prepare": {"tokenizer": "t", "data": TEMPLATED, "sft": SEQUENCES},
    "filter": {"tokenizer": "t", "data": TEMPLATED, "max_sequence_length": 64},
    "generate": {"model": MODEL, "data": TEMPLATED},
    "logprobs": {"model": MODEL, "data": TEMPLATED},
    "rewards": {"data": DATASETS, "rewards": [REWARD]},
    "exec": {"command": ["true"], "outputs": [{"name": "made", "path": "out"}]},
    "sft": {"model": MODEL, "data": TEMPLATED, "sft": SEQUENCES, "training": TRAINING},
    "dpo": {
        "model": MODEL,
        "data": TEMPLATED,
        "dpo": {},
        "loss": {"beta": 0.1},
        "training": TRAINING,
    },
    "reward-model": {"model": MODEL, "data": TEMPLATED, "training": TRAINING},
    "convert": {"checkpoint": "iter_0001000", "tokenizer": "t"},
    "merge": {"method": "linear", "models": [{"path": "a"}, {"path": "b"}]},
}


def config_of(stage: str, **settings: Any) -> StageConfig:
    given = json.dumps({**SETTINGS[stage], **settings})
    return find_stage(stage).load_config_class().model_validate_json(given, strict=True)


# Of runs that are recorded, and in the names of pipelines' folders.
RECIPE_HASHES = {
    "mix": "8ed6f32ad64cf0d76d6b5d5397eaeb6b97af82875f0c36b8168594d381a7e772",
    "split": "92d275f2937d3db58b7c73704390c9dc4e488c23e24c1f8738e19496b6d0ef93",
    "select": "7f89cd38c58d74436f09c20ece5875b4a44e5801a00b8186ca5d1a6929a40a9d",
    "tokenize": "c43d1e70ceaa668e5a5390025fb5eb732478950d08f181f86392f74783b36cb4",
    "prepare": "d981bbb24d0b9e9a5d0304b27674f469b6034ff2eb6b603c5db072556e672e30",
    "filter": "4115fd5c5d532fd79843ad81737d3655deb6955e02f9be5cb297a9306d27dcdb",
    "generate": "d083b1dd4fbb6e89e6fc5542b91e88661bd57a02a0c671f3ba3a9a358f8e25b5",
    "logprobs": "0285c153785eaac167e6c65563f7c5c646759fd58b542f32620e73418664b633",
    "rewards": "0ff7f703f44f285d807db9a347b66c68e5169ce5ea90c4ff370c18293db87577",
    "exec": "38313bcdbea1ff2e811ec9b0c2a5dd93b08905978fb81d0207623f25060f5301",
    "sft": "047677a3a93b7c1671a792435b3be2473215503e456617a6da06a6ccc429bb37",
    "dpo": "a3f1aaa32523f3baf0af8b4415ed04a32cc5dc5d4dabeb192e40f2d31373804c",
    "reward-model": "965097f9b19def9d4a996a41efc229cecc05077a7c5636ce23e158c58656b94f",
    "convert": "cd6a2f88235cafddba666e2404b59858df3746c43a4b4d8109af6730e3ebbde3",
    "merge": "4cdbc1ef54a7df70105f7d27ad9735c464a06581380aea6c16ed58b93c3beec5",
}


@pytest.mark.parametrize("stage", RECIPE_HASHES)
def test_recipe_hash_of_what_computes_the_same_is_the_recorded_one(stage: str):
    """A setting that is new and at its default is ADDED_LATER (config/model.py). Only where what is
    computed changes is the hash another."""
    assert recipe_hash(stage, config_of(stage)) == RECIPE_HASHES[stage]


def test_setting_added_later_counts_once_it_is_set():
    ignored = {"datasets": [{"path": "a.jsonl", "ignore": ["label"]}, {"path": "b.jsonl"}]}
    mix = config_of("mix", data=ignored)
    assert recipe_hash("mix", mix) != RECIPE_HASHES["mix"]
    keys = [key for key in settings_by_role(mix)[Role.RECIPE] if key.endswith(".ignore")]
    assert keys == ["data.datasets[0].ignore"]
