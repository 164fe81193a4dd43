"""The folder of a run that nobody named."""

from pathlib import Path
from typing import Any

import pytest

from post_training.config.model import Role, settings_by_role
from post_training.records.run import RunDescription
from post_training.stages.config import SplitConfig
from post_training.stages.run_dirs import default_run_dir
from post_training.train.config import SftConfig

DIGEST = "[0-9a-f]{12}"


def sft(model: dict[str, str], datasets: list[dict[str, str]], **settings: Any) -> SftConfig:
    return SftConfig.model_validate(
        {
            "model": model,
            "data": {"chat_template": "chatml", "datasets": datasets},
            "sft": {"max_seq_length": 64},
            "training": {"max_steps": 1, "effective_batch_size": 1, "learning_rate": 1e-5},
            **settings,
        }
    )


def described(config: Any, stage: str = "sft") -> RunDescription:
    return RunDescription(
        stage=stage,
        recipe=settings_by_role(config)[Role.RECIPE],
        topology={},
        inputs={},
        image=None,
        facts={"debug": config.debug.enabled},
    )


@pytest.mark.parametrize(
    ("model", "datasets", "name"),
    [
        ({"path": "models/Apertus-8B"}, [{"path": "data/tulu.jsonl"}], "apertus-8b-tulu"),
        # A folder that every run has says nothing: the run's name does.
        ({"path": "runs/my-sft/model"}, [{"path": "a.jsonl"}, {"path": "b.jsonl"}], "my-sft-a+1"),
        (
            {"hub": "org/Apertus-8B", "revision": "a" * 40, "hub_dir": "hub"},
            [{"hub": "allenai/tulu-3-sft-mixture", "split": "train"}],
            "apertus-8b-tulu-3-sft-mixture",
        ),
        ({"path": "m"}, [{"path": "x.jsonl", "name": "Größe & Länge"}], "m-gr-e-l-nge"),
    ],
)
def test_run_folder_is_named_for_readers_and_by_its_digest(
    model: dict, datasets: list, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = sft(model, datasets)
    found = default_run_dir(config, described(config))
    stem, _, digest = found.name.rpartition("-")
    assert (found.parent, stem) == (Path("runs"), f"sft-{name}")
    assert len(digest) == 12
    # The names say nothing about identity; another recipe is another folder.
    other = sft(model, datasets, seed=1)
    assert default_run_dir(other, described(other)).name.rpartition("-")[0] == stem
    assert default_run_dir(other, described(other)) != found


def test_run_folder_of_an_earlier_version_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    config = sft({"path": "m"}, [{"path": "x.jsonl"}])
    digest = default_run_dir(config, described(config)).name.rpartition("-")[2]
    (tmp_path / "runs" / f"sft-{digest}").mkdir(parents=True)
    assert default_run_dir(config, described(config)) == Path("runs", f"sft-{digest}")


def test_run_folder_is_below_output_base_and_that_of_a_trial_in_its_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    given = {"data": {"datasets": [{"path": "rows.jsonl"}]}, "eval_size": 5, "output_base": "out"}
    config = SplitConfig.model_validate(given)
    found = default_run_dir(config, described(config, "split"))
    assert (found.parent, found.name[:11]) == (Path("out"), "split-rows-")
    trial = SplitConfig.model_validate(given | {"debug": {"enabled": True}})
    assert default_run_dir(trial, described(trial, "split")).parent == Path("out/debug")
