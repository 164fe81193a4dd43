"""`post-training experiment new`: what it makes can be planned as it is."""

from pathlib import Path

import pytest

from post_training.slurm.pipeline import plan_pipeline

REPOSITORY = Path(__file__).parents[3]


def test_experiment_new_makes_a_pipeline_that_can_be_planned(post_training, tmp_path, monkeypatch):
    done = post_training("experiment", "new", "my-try", "--parent=.")
    assert (done.returncode, done.stdout) == (0, "my-try\n"), done.stderr
    assert (tmp_path / "my-try/README.md").read_text().startswith("# my-try\n")
    monkeypatch.chdir(REPOSITORY)
    path = tmp_path / "my-try/pipeline.yaml"
    plan = plan_pipeline(path)
    assert plan.folder == REPOSITORY / "runs/my-try"
    assert [run.name for run in plan.runs] == ["base", "parts", "train"]
    commented = path.read_text().split("# sweep:")
    path.write_text(commented[0] + "sweep:" + commented[1].replace("\n#  ", "\n "))
    assert len(plan_pipeline(path).runs) == 2 + 4


def test_experiment_new_twice_is_refused_and_keeps_the_first(post_training, tmp_path):
    post_training("experiment", "new", "one", "--parent=.")
    (tmp_path / "one/README.md").write_text("mine")
    done = post_training("experiment", "new", "one", "--parent=.")
    assert done.returncode == 2
    assert (tmp_path / "one/README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "A", "", "-x"])
def test_experiment_new_of_a_name_that_cannot_be_is_refused(post_training, tmp_path, name):
    assert post_training("experiment", "new", "--parent=.", "--", name).returncode == 2
    assert list(tmp_path.iterdir()) == []
