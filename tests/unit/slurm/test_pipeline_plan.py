"""Run folders of a pipeline's stages: named for what is computed, and for nothing else."""

import pytest

from post_training.core.errors import ConfigError, UsageError
from post_training.slurm.pipeline import plan_pipeline
from post_training.stages.config import SplitConfig

PIPELINE = """\
run_dir: runs
stages:
  parts:
    stage: split
    config: {data: {datasets: [{path: rows.jsonl}]}, eval_size: 1}
  other:
    stage: mix
    config: {data: {datasets: [{path: rows.jsonl}]}}
  mixed:
    stage: mix
    config: {data: {datasets: [{path: "${stages.parts.dataset}/train.jsonl"}]}}
    scheduler: {nodes: 2}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan("key=value", …): {name: folder's name}; plan.runs has the runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def plan(*overrides: str, text: str = PIPELINE) -> dict[str, str]:
        (tmp_path / "pipeline.yaml").write_text(text)
        plan.runs = plan_pipeline(tmp_path / "pipeline.yaml", overrides).runs
        return {run.name: run.run_dir.name for run in plan.runs}

    return plan


def test_plan_runs_are_whole_and_in_the_order_of_their_needs(plan, tmp_path):
    plan()
    parts, mixed = (run for run in plan.runs if run.name != "other")
    assert parts.config.run_dir == parts.run_dir
    assert parts.run_dir.parent == tmp_path / "runs"
    assert mixed.needs == (parts.run_dir,)
    assert mixed.config.data.datasets[0].path == parts.run_dir / "dataset/train.jsonl"
    assert mixed.scheduler == {"nodes": 2}


def test_plan_again_or_with_another_placement_has_the_same_folders(plan):
    first = plan()
    assert plan() == first
    assert plan("stages.parts.config.num_threads=1", "stages.mixed.needs=[other]") == first


def test_plan_changed_setting_moves_that_stage_and_those_behind_it(plan):
    before, after = plan(), plan("stages.parts.config.seed=1")
    assert {name for name in before if before[name] != after[name]} == {"parts", "mixed"}
    after = plan("stages.mixed.config.seed=1")
    assert {name for name in before if before[name] != after[name]} == {"mixed"}


def test_plan_next_version_of_a_stage_moves_it_and_those_behind_it(plan, monkeypatch):
    before = plan()
    monkeypatch.setattr(SplitConfig, "version", SplitConfig.version + 1)
    after = plan()
    assert {name for name in before if before[name] != after[name]} == {"parts", "mixed"}


def test_plan_changed_input_moves_what_reads_it(plan, tmp_path):
    before = plan()
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    assert set(plan().values()).isdisjoint(before.values())


def test_plan_renamed_input_of_the_same_content_keeps_the_folder(plan, tmp_path):
    before = plan()
    (tmp_path / "rows.jsonl").rename(tmp_path / "renamed.jsonl")
    after = plan(text=PIPELINE.replace("{path: rows.jsonl}", "{path: renamed.jsonl}"))
    assert after == before


def test_plan_variants_share_what_the_sweep_does_not_change(plan):
    sweep = "sweep: {stages.mixed.config.seed: [0, 1]}\n"
    before, after = plan(), plan(text=PIPELINE + sweep)
    assert set(after) == {"parts", "other", "mixed[seed=0]", "mixed[seed=1]"}
    assert after["parts"] == before["parts"]
    assert after["mixed[seed=0]"] == before["mixed"]


@pytest.mark.parametrize("key", ["num_threads", "debug.enabled"])
def test_plan_sweep_whose_variants_would_share_a_folder_is_refused(plan, key):
    values = {"num_threads": "[1, 2]", "debug.enabled": "[false, true]"}[key]
    with pytest.raises(UsageError) as caught:
        plan(text=PIPELINE + f"sweep: {{stages.parts.config.{key}: {values}}}\n")
    assert "variants of parts have one recipe, so one folder would have both" in str(caught.value)
    assert f"({key}: " in str(caught.value)


def test_plan_name_has_only_the_swept_settings_that_reach_the_stage(plan):
    sweep = "sweep:\n  stages.parts.config.eval_size: [1, 2]\n  stages.mixed.config.seed: [0, 1]\n"
    assert set(plan(text=PIPELINE + sweep)) == {
        "other", "parts[eval_size=1]", "parts[eval_size=2]",
        *(f"mixed[eval_size={size},seed={seed}]" for size in (1, 2) for seed in (0, 1)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("stages.parts.stage=spilt", "no stage 'spilt'"),
        ("stages.parts.config.seeds=1", "unknown key 'seeds', did you mean 'seed'?"),
        ("stages.parts.array=2", "array: split is not done in chunks"),
        (
            "stages.parts.config.data.datasets=[{path: no.jsonl}]",
            "stages.parts: data.datasets[0].path: no such file or folder: no.jsonl",
        ),
        (
            "stages.mixed.config.data.datasets=[{path: '${stages.parts.model}'}]",
            "data.datasets[0].path: split leaves no 'model' (it leaves dataset)",
        ),
        (
            "stages.parts.config.debug={enabled: true, override_existing: true}",
            "stages.parts: debug.override_existing",
        ),
    ],
)
def test_plan_that_cannot_be_is_refused_by_name(plan, override, fault):
    with pytest.raises((UsageError, ConfigError)) as caught:
        plan(override)
    assert fault in str(caught.value)


def test_plan_refers_to_the_outputs_that_a_command_names(plan):
    text = """\
run_dir: runs
stages:
  make:
    stage: exec
    config:
      command: [cp, rows, out]
      inputs: [{name: rows, path: rows.jsonl}]
      outputs: [{name: copied, path: out}]
  mixed:
    stage: mix
    config: {data: {datasets: [{path: "${stages.make.copied}"}]}}
"""
    folder = plan(text=text)["make"]
    assert str(plan.runs[1].config.data.datasets[0].path).endswith(f"{folder}/copied")
    with pytest.raises(ConfigError, match="exec leaves no 'output' \\(it leaves copied\\)"):
        plan(text=text.replace("stages.make.copied", "stages.make.output"))
