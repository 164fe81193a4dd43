"""A policy and all that it came from are reproduced from their records: the same bytes. What is
changed on the way is refused, or named.

    init-model -> sft -> generate -> logprobs -> rewards -> select -> dpo
"""

import json
import shutil

import pytest

from post_training.records.artifact import read_artifact

pytestmark = pytest.mark.image

LENGTH = """
from post_training.data.rewards import register_reward


@register_reward("length")
def length(answer, row):
    return float(len(answer))
"""
STAGES = {
    "generate": """
model: {path: run/model}
data: {chat_template: chatml, datasets: [{path: sums.jsonl, columns: {prompt: question}}]}
sampling: {n: 4, max_tokens: 12}
chunk_rows: 10
""",
    "logprobs": """
model: {path: run/model}
data: {chat_template: chatml, datasets: [{path: generate/dataset/rows.jsonl}]}
""",
    "rewards": """
functions: [length.py]
data: {datasets: [{path: logprobs/dataset/rows.jsonl}]}
rewards: [{name: length, function: length}]
""",
    "select": """
data: {datasets: [{path: rewards/dataset/rows.jsonl}]}
reward: length
samples: reference
exclude_truncated: false
strategy: {name: random, num_pairs: 1}
""",
    "dpo": """
model: {path: run/model}
data: {chat_template: chatml, datasets: [{path: select/dataset/pairs.jsonl}]}
dpo: {max_completion_length: 64, truncated_completions: train}
loss: {name: qrpo, beta: 0.5}
training:
  {max_steps: 3, effective_batch_size: 4, per_device_train_batch_size: 2, learning_rate: 1e-3}
logging: {logging_steps: 1}
""",
}


@pytest.fixture
def run(entrypoint):
    def run(stage: str, *arguments: str) -> None:
        done = entrypoint(stage, f"{stage}.yaml", *arguments)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def policy(job, run):
    """The folder of the last run of the chain."""
    if not (job / "dpo").exists():
        (job / "length.py").write_text(LENGTH)
        for stage, text in STAGES.items():
            (job / f"{stage}.yaml").write_text(f"{text}run_dir: {stage}\n")
            run(stage)
    return job / "dpo"


@pytest.mark.long
def test_policy_and_its_whole_lineage_are_reproduced_identical(policy, post_training):
    done = post_training("reproduce", policy / "model", "--upstream")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ")
    assert done.stderr.count(": identical: ") == len(STAGES) + 1  # and init-model and sft
    again = policy.with_name("dpo-reproduced-1")
    assert read_artifact(again / "model") | {"made_by": 0} == (
        read_artifact(policy / "model") | {"made_by": 0}
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=8", "recipe       seed: "),
        ("training.effective_batch_size=8", "recipe       training.effective_batch_size: 4 -> 8"),
        ("num_processes=2", "topology     world_size: 1 -> 2"),
        ("data.chat_template=zephyr", "recipe       data.chat_template: 'chatml' -> 'zephyr'"),
    ],
)
def test_changed_setting_is_named_and_the_outcome_parts(job, run, post_training, change, named):
    run_dir = f"changed-{change.split('=')[0]}"
    run("sft", f"run_dir={run_dir}", change)
    done = post_training("runs", "diff", job / "run", job / run_dir)
    assert done.returncode == 4
    assert any(line.startswith(named) for line in done.stdout.splitlines()), done.stdout
    assert "\noutcome      differs as it must: " in done.stdout


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sums.jsonl", "data.datasets[0].path"),
        ("init/model/model.safetensors", "model.path"),
        ("init/model/chat_template.jinja", "model.path"),
    ],
)
def test_changed_bit_of_a_row_a_weight_or_a_template_is_refused_by_name(
    job, post_training, name, key
):
    before, path = sorted(job.iterdir()), job / name
    kept = path.with_suffix(".kept")
    shutil.copy(path, kept)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    done = post_training("reproduce", job / "run")
    kept.replace(path)
    assert done.returncode == 2
    assert f"error: {key}: changed: " in done.stderr
    assert sorted(job.iterdir()) == before


@pytest.mark.long
def test_template_with_one_more_space_is_named_and_the_outcome_parts(job, run, post_training):
    for name in ("plain", "spaced"):
        shutil.copytree(job / "init/model", job / name, ignore=shutil.ignore_patterns("artifact*"))
    template = job / "spaced/chat_template.jinja"
    start = "<|im_start|>assistant"
    template.write_text(template.read_text().replace(start, f"{start} "))
    for name in ("plain", "spaced"):
        model = (f"model.path={name}", "data.chat_template=model")
        run("sft", f"run_dir=of-{name}", *model)
    done = post_training("runs", "diff", job / "of-plain", job / "of-spaced")
    assert done.returncode == 4
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("input")][1:] == [
        "input        model.path: chat_template.jinja"
    ]
    assert "\noutcome      differs as it must: " in done.stdout


@pytest.mark.long
def test_lineage_hash_says_the_recipes_of_every_step(policy, job, run):
    run("sft", "run_dir=other", "training.learning_rate=2e-3")
    model = {"model.path": "other/model"}
    arguments = [f"{key}={json.dumps(value)}" for key, value in model.items()]
    run("generate", "run_dir=other-samples", *arguments)
    ours = read_artifact(job / "generate/dataset")["lineage_hash"]
    assert read_artifact(job / "other-samples/dataset")["lineage_hash"] != ours
