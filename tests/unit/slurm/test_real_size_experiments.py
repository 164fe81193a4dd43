"""The experiments of the real size: planned whole, with the ranks of the site they are for.

tests/stack/stages/test_real_size_experiments.py runs them with tiny models.
"""

import re
from pathlib import Path

import pytest

from post_training.slurm.pipeline import Plan, plan_pipeline
from post_training.slurm.site import load_site

FOLDER = Path(__file__).parents[3] / "reproducibility"
EXPERIMENTS = {
    "sft-apertus-8b": ("clariden", ["split", "prepare", "prepare-eval", "sft"]),
    "sft-apertus-70b": ("clariden", ["split", "prepare", "prepare-eval", "sft"]),
    "sft-lumi-30b": ("lumi", ["tokenize", "sft"]),
    "align-apertus": (
        "clariden",
        ["filter", "generate", "logprobs", "rewards", "select", "dpo-norm", "qrpo"],
    ),
}


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """plan("sft-apertus-8b"), where its inputs are."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "policy", "reward-model"):
        (tmp_path / "inputs" / name).mkdir(parents=True)
        (tmp_path / "inputs" / name / "config.json").write_text("{}")
    for name in ("train", "prompts"):
        (tmp_path / "inputs" / f"{name}.jsonl").write_text("{}\n")

    def plan(name: str, *overrides: str) -> Plan:
        return plan_pipeline(FOLDER / name / "pipeline.yaml", overrides)

    return plan


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_is_planned_and_its_ranks_divide_its_batches(plan, name):
    site, stages = EXPERIMENTS[name]
    runs = plan(name).runs
    assert [run.name for run in runs] == stages
    for run in runs:
        scheduler = load_site(site, run.scheduler).scheduler
        run.config.check_ranks(scheduler.num_tasks)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_page_of_the_experiment_names_its_inputs_and_its_site(name):
    site, _ = EXPERIMENTS[name]
    page = (FOLDER / name / "README.md").read_text()
    text = (FOLDER / name / "pipeline.yaml").read_text()
    for wanted in set(re.findall(r"inputs/[\w.-]+", text)):
        assert wanted in page
    assert f"--site {site}" in page


def test_alignment_has_the_settings_of_the_steps_that_it_replaces(plan):
    configs = {run.name: run.config for run in plan("align-apertus").runs}
    sampling = configs["generate"].sampling
    assert (sampling.n, sampling.temperature, sampling.top_p) == (10, 1.0, 1.0)
    assert sampling.max_tokens == configs["filter"].max_sequence_length == 4096
    for name in ("dpo-norm", "qrpo"):
        config = configs[name]
        assert config.loss.name == name
        assert config.loss.beta == 5
        assert config.loss.beta_is_per_length
        assert config.reference.logprobs == "stored"
        assert config.training.effective_batch_size == 512
        assert config.training.learning_rate == 5e-7
        assert config.training.max_grad_norm == 20


def test_alignment_of_another_strategy_is_selected_and_trained_anew_alone(plan):
    before = {run.name: run.run_dir for run in plan("align-apertus").runs}
    changed = plan("align-apertus", "stages.select.config.strategy.name=best-worst")
    after = {run.name: run.run_dir for run in changed.runs}
    assert {name for name in before if before[name] != after[name]} == {
        "select",
        "dpo-norm",
        "qrpo",
    }
