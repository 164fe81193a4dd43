"""The loss and the gradient are those of the definition, however a batch is divided up."""

import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from post_training.data.order import row_stream
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION


def reference(run_dir: Path, model_path: Path, seed: int, num_rows: int) -> tuple[float, float]:
    """(loss, gradient norm) of the first step in float64, from the definition.

    Σ over all sequences and trained tokens t of -log softmax(logits_{t-1})[x_t], divided by the
    number of those tokens in the whole batch; one sequence after another, without padding.
    """
    rows = PreparedDataset.open(run_dir / "data")
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    )
    total, num_tokens = torch.zeros((), dtype=torch.float64), 0
    for index in islice(row_stream(len(rows), seed), num_rows):
        row = rows.read(index)
        ends = np.cumsum(row.lengths)[:-1]
        for ids, kinds in zip(np.split(row.ids, ends), np.split(row.kinds, ends), strict=True):
            logprobs_TV = model(torch.tensor(ids[None].astype(int))).logits[0].log_softmax(-1)
            for position in range(1, len(ids)):
                if kinds[position] == COMPLETION:
                    total = total - logprobs_TV[position - 1, int(ids[position])]
                    num_tokens += 1
    loss = total / num_tokens
    loss.backward()
    squares = sum(float((weights.grad**2).sum()) for weights in model.parameters())
    return float(loss.detach()), math.sqrt(squares)


@pytest.fixture
def one_step(config: dict[str, Any], model: Path) -> dict[str, Any]:
    steps = {"training.max_steps": 1, "logging.logging_steps": 1}
    return changed(config, **{"model.path": str(model)}, **steps)


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_sft_first_step_has_the_loss_and_gradient_of_the_definition(
    micro: int, one_step: dict[str, Any], model: Path, tmp_path: Path
):
    sft(changed(one_step, **{"training.per_device_train_batch_size": micro}), tmp_path / "run")
    loss, grad_norm = reference(tmp_path / "run", model, one_step["seed"], 8)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=2e-6)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=2e-5)


@pytest.mark.parametrize("packing", ["bfd", "k_bin_packed", "next_fit"])
@pytest.mark.parametrize(
    ("architecture", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("apertus", "sdpa")]
)
def test_sft_first_step_on_packed_rows_has_the_loss_of_their_sequences_alone(
    packing: str,
    architecture: str,
    attention: str,
    one_step: dict[str, Any],
    init_model: Any,
    tmp_path: Path,
):
    model = init_model(tmp_path / "init", architecture=architecture)
    settings = {
        "model.path": str(model),
        "model.attn_implementation": attention,
        "sft.packing": packing,
        "training.effective_batch_size": 4,
    }
    sft(changed(one_step, **settings), tmp_path / "run")
    loss, grad_norm = reference(tmp_path / "run", model, one_step["seed"], 4)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def test_sft_first_step_of_an_apertus_model_has_the_loss_of_the_definition(
    one_step: dict[str, Any], init_model: Any, tmp_path: Path
):
    model = init_model(tmp_path / "init", architecture="apertus")
    sft(changed(one_step, **{"model.path": str(model)}), tmp_path / "run")
    loss, grad_norm = reference(tmp_path / "run", model, one_step["seed"], 8)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)


def test_sft_batch_of_eight_and_eight_of_one_train_alike(
    config: dict[str, Any], model: Path, tmp_path: Path
):
    weights = []
    for micro in (8, 1):
        run_dir = tmp_path / str(micro)
        settings = {"training.per_device_train_batch_size": micro, "model.path": str(model)}
        sft(changed(config, **settings), run_dir)
        trained = AutoModelForCausalLM.from_pretrained(run_dir / "model")
        weights.append(trained.state_dict())
    for name, one in weights[0].items():
        assert one.sub(weights[1][name]).abs().max() < 2e-3, name
    for one, other in zip(metrics(tmp_path / "8"), metrics(tmp_path / "1"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["num_trained_tokens"] == other["num_trained_tokens"]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"training.gradient_checkpointing": True}, 1e-6),
        ({"model.attn_implementation": "eager"}, 1e-5),
        ({"training.mixed_precision": "bf16"}, 2e-2),
        ({"model.dtype": "bfloat16"}, 2e-2),
    ],
)
def test_sft_first_step_with_other_arithmetic_stays_close(
    settings: dict[str, Any],
    tolerance: float,
    one_step: dict[str, Any],
    model: Path,
    tmp_path: Path,
):
    sft(changed(one_step, **settings), tmp_path / "run")
    loss, grad_norm = reference(tmp_path / "run", model, one_step["seed"], 8)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(loss, rel=tolerance)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=10 * tolerance)


def test_sft_learning_rate_follows_warmup_and_schedule(config: dict[str, Any], tmp_path: Path):
    sft(changed(config, **{"logging.logging_steps": 1}), tmp_path / "run")
    # warmup 2 of 12 steps to 0.01, then half a cosine over the other 10
    expected = [
        0.01 * (n / 2 if n < 2 else (1 + math.cos(math.pi * (n - 2) / 10)) / 2) for n in range(12)
    ]
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run")]
    assert rates == pytest.approx(expected)
