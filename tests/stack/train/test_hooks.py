"""What the pinned transformers and TRL call of our Trainer, and in which order.

A new version of theirs that calls a hook elsewhere, in another order or no longer at all would
change what a step does, and say nothing.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, sft

BEFORE_THE_FIRST_STEP = [
    "_send_telemetry",
    "_get_train_sampler",
    "_prepare_for_training",
    "get_decay_parameter_names",
    "create_scheduler",
]
MICRO_BATCHES = ["compute_loss", "floating_point_ops"] * 2
AFTER_THEM = ["_get_grad_norm", "_maybe_log_save_evaluate"]
CHECKPOINT = ["_save_checkpoint", "create_model_card"]
STEP = ["get_batch_samples", *MICRO_BATCHES, *AFTER_THEM]
AT_THE_END = ["_maybe_log_save_evaluate"]
# Only a resumed run calls these two.
READ_WEIGHTS, READ_RANDOM_STATE = "_load_from_checkpoint", "_load_rng_state"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the hooks, in the order of their calls."""
    from post_training.train.trainer import Trainer

    made: list[str] = []

    def recorded(name: str, hook: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return hook(self, *args, **kwargs)

        return call

    for name in overridden():
        monkeypatch.setattr(Trainer, name, recorded(name, vars(Trainer)[name]))
    return made


def overridden() -> set[str]:
    """What is a method of our Trainer and of the library's."""
    from trl import SFTTrainer

    from post_training.train.trainer import Trainer

    return {name for name in vars(Trainer) if hasattr(SFTTrainer, name) and name[:2] != "__"}


def test_overridden_methods_are_those_whose_calls_are_tested():
    tested = {*BEFORE_THE_FIRST_STEP, *STEP, *CHECKPOINT, READ_WEIGHTS, READ_RANDOM_STATE}
    # One that the library has no longer is missing here; a new one of ours is too many.
    assert overridden() == tested


def test_private_attributes_that_are_set_are_still_read():
    import transformers
    from trl import SFTTrainer

    assert SFTTrainer.loss_is_scaled_for_ga is None  # not set by a version that knows no such thing
    assert hasattr(transformers.TrainingArguments(output_dir="unused", use_cpu=True), "_n_gpu")


def test_hooks_are_called_in_the_order_of_a_step(
    config: dict[str, Any], calls: list[str], tmp_path: Path
):
    sft(two_steps(config), tmp_path / "run")
    step = [*STEP, *CHECKPOINT]
    assert calls == [*BEFORE_THE_FIRST_STEP, *step, *step, *AT_THE_END]


def test_hooks_of_a_resumed_run_read_the_weights_first_and_the_random_state_last(
    config: dict[str, Any], calls: list[str], tmp_path: Path
):
    settings = two_steps(config)
    sft(settings, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-2")
    (checkpoints / "latest").write_text("checkpoint-1\n")
    calls.clear()
    sft(settings, tmp_path / "run", resuming=True)
    telemetry, *others = BEFORE_THE_FIRST_STEP
    batches, *rest = STEP
    step = [batches, READ_RANDOM_STATE, *rest, *CHECKPOINT]
    assert calls == [telemetry, READ_WEIGHTS, *others, *step, *AT_THE_END]
    # It made the second step alone.
    steps = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 2]


def two_steps(config: dict[str, Any]) -> dict[str, Any]:
    """Of two micro-batches each, with a checkpoint after each."""
    settings = {"training.max_steps": 2, "training.effective_batch_size": 4, "training.warmup": 0}
    return changed(config, **settings, **{"checkpointing.save_steps": 1})
