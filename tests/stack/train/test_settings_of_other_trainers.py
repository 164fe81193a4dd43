"""Settings that users of other trainers know: checkpoints and evaluations per epoch, an end at an
interval, micro-batches of one shape. None of them changes what is trained."""

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.sft_runs import changed, metrics, sft
from post_training.core.errors import Interrupted
from post_training.core.hashing import sha256_file
from post_training.train.loss import round_up


@pytest.fixture(scope="module")
def runs(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same training twice: plain, and with an end at step 6 and each epoch's events."""
    folder = tmp_path_factory.mktemp("runs")
    plain = changed(config, **{"checkpointing.save_total_limit": None})
    plain["evaluation"] = {"datasets": config["data"]["datasets"], "debug_subsample": 4}
    events = changed(plain, **{"training.exit_interval": 6, "checkpointing.saves_per_epoch": 2})
    del events["checkpointing"]["save_steps"]
    events["evaluation"]["evals_per_epoch"] = 1
    sft(plain, folder / "plain")
    with pytest.raises(Interrupted) as ended:
        sft(events, folder / "events")
    at_the_end = sorted(path.name for path in (folder / "events/checkpoints").glob("checkpoint-*"))
    sft(events, folder / "events", resuming=True)
    return folder, ended.value, at_the_end


def test_exit_interval_ends_as_a_signal_does_and_the_same_command_goes_on(runs: Any):
    folder, ended, at_the_end = runs
    assert ended.exit_code == 128 + signal.SIGUSR1
    assert at_the_end == ["checkpoint-4", "checkpoint-6"]
    weights = [
        sha256_file(folder / name / "model/model.safetensors") for name in ("plain", "events")
    ]
    assert weights[0] == weights[1]


def test_saves_and_evals_per_epoch_are_at_their_steps(runs: Any):
    folder, _, _ = runs
    # 50 rows, 8 a step: 6.25 steps an epoch.
    made = {path.name for path in (folder / "events/checkpoints").glob("checkpoint-*")}
    assert made == {"checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-12"}
    evaluated = [line["step"] for line in metrics(folder / "events") if "eval" in line]
    assert evaluated == [7, 12]


def test_padding_to_a_multiple_trains_the_same_but_for_rounding(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    # Without dropout, which draws for padding too.
    settings = {"model.path": str(model), "training.max_steps": 2, "logging.logging_steps": 1}
    plain = changed(config, **settings)
    sft(plain, tmp_path / "plain")
    sft(changed(plain, **{"training.pad_to_multiple_of": 64}), tmp_path / "padded")
    of_plain, of_padded = metrics(tmp_path / "plain"), metrics(tmp_path / "padded")
    losses = [[line["loss"] for line in lines] for lines in (of_plain, of_padded)]
    assert np.allclose(*losses, rtol=1e-4)
    assert of_padded[-1]["num_tokens"] == of_plain[-1]["num_tokens"]


def test_round_up_is_the_smallest_multiple_that_holds_it():
    assert [round_up(length, 64) for length in (1, 64, 65)] == [64, 64, 128]
    assert round_up(65, 1) == 65
