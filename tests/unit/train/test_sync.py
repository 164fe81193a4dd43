"""What of an ended run is shown elsewhere; the services themselves are in tests/stack."""

from pathlib import Path

from helpers.ended_runs import ended_run
from post_training.train.sync import EndedRun


def test_run_that_is_shown_later_is_shown_where_it_was_to_be(tmp_path: Path):
    placement = {"logging.wandb_entity": "team", "logging.wandb_group": "g"}
    (tmp_path / "base").mkdir()
    run_dir = ended_run(tmp_path / "one", tmp_path / "base", placement=placement)
    config = EndedRun.read(run_dir).logging("elsewhere")
    assert (config.wandb_entity, config.wandb_project) == ("team", "elsewhere")
    assert (config.wandb_group, config.wandb_run_name) == ("g", "one")
