"""The first step's loss and gradient are those of the formulas, however pairs are laid out.

The gradient is read off the weights: one step of plain SGD with learning rate 1. The reference's
logprobs stand in the data, away from the model's, so that no ratio is 1.
"""

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.dpo_runs import dpo, preference_rows
from helpers.row_files import write_rows
from helpers.sft_runs import changed, metrics
from helpers.stage_process import rank_file, run_stage_on_ranks
from post_training.data.order import row_stream
from post_training.data.pairs.dataset import PairDataset
from post_training.data.rows import COMPLETION

LOSSES = {
    "dpo": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "dpo-norm": {"name": "dpo-norm", "beta": 5.0},
    "qrpo": {"name": "qrpo", "beta": 0.2, "normalize_loss_by_length": True},
}
BATCH = 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded one by one": {"training.per_device_train_batch_size": 1},
    "padding-free": {"training.padding_free": True},
    "shared": {"dpo.share_prompt": True, "training.per_device_train_batch_size": 3},
    "shared eager": {"dpo.share_prompt": True, "model.attn_implementation": "eager"},
    "shared padding-free": {"dpo.share_prompt": True, "training.padding_free": True},
    "shared recomputed": {"dpo.share_prompt": True, "training.gradient_checkpointing": True},
}
PACKED = {"dpo.packing": "bfd", "dpo.max_seq_length": 260}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = preference_rows(30)
    for number, row in enumerate(rows):
        row["ref_chosen_logprob"] = -20.0 - number
        row["ref_rejected_logprob"] = -45.5 + number
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture
def one_step(model: Path, pairs: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(pairs)}]},
        "dpo": {},
        "loss": LOSSES["dpo"],
        "reference": {"logprobs": "stored", "tolerance": 1e9},
        "training": {
            "max_steps": 1,
            "effective_batch_size": BATCH,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "optimizer": "sgd",
            "max_grad_norm": 0,
        },
        "logging": {"logging_steps": 1},
        "num_threads": 1,
        "seed": 7,
    }


def reference(
    run_dir: Path, config: dict[str, Any], num_rows: int
) -> tuple[float, dict[str, Any], dict[str, float]]:
    """(loss, gradients by name, figures), in float64: one sequence after another, alone."""
    dataset, loss = PairDataset.open(run_dir / "data"), config["loss"]
    model = AutoModelForCausalLM.from_pretrained(
        config["model"]["path"], dtype=torch.float64, attn_implementation="eager"
    )
    losses, margins = [], []
    for row in islice(row_stream(len(dataset), config["seed"]), num_rows):
        for pair in dataset.read(row):
            terms = []
            for index, answer in enumerate((pair.chosen, pair.rejected)):
                ids = np.concatenate([pair.prefix, answer.ids]).astype(int)
                logprobs = model(torch.tensor(ids[None])).logits[0].log_softmax(-1)
                trained = [
                    len(pair.prefix) + place
                    for place, kind in enumerate(answer.kinds)
                    if kind == COMPLETION
                ]
                total = sum(logprobs[place - 1, ids[place]] for place in trained)
                ref_logprob, quantile, _ = pair.figures[index].tolist()
                beta = loss["beta"] / (len(trained) if loss["name"] == "dpo-norm" else 1)
                terms.append((beta * (total - ref_logprob), quantile, len(trained)))
            margin = terms[0][0] - terms[1][0]
            margins.append(float(margin.detach()))
            if loss["name"] == "qrpo":
                beta = loss["beta"]
                beta_z = beta * (math.log(beta) + 1 / beta + math.log1p(-math.exp(-1 / beta)))
                squares = [(r - beta_z - reward) ** 2 / size for reward, r, size in terms]
                losses.append(sum(squares) / 2)
            else:
                epsilon = loss.get("label_smoothing", 0.0)
                losses.append(
                    (1 - epsilon) * torch.log1p(torch.exp(-margin))
                    + epsilon * torch.log1p(torch.exp(margin))
                )
    total = sum(losses) / len(losses)
    total.backward()
    figures = {
        "rewards/margins": sum(margins) / len(margins),
        "rewards/accuracies": sum(margin > 0 for margin in margins) / len(margins),
    }
    gradients = {name: weights.grad for name, weights in model.named_parameters()}
    return float(total.detach()), gradients, figures


def assert_first_step(run_dir: Path, config: dict[str, Any], num_rows: int) -> None:
    expected, gradients, figures = reference(run_dir, config, num_rows)
    [line] = metrics(run_dir)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    for name, value in figures.items():
        assert line[name] == pytest.approx(value, rel=1e-5), name
    before = AutoModelForCausalLM.from_pretrained(config["model"]["path"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    for name, gradient in gradients.items():
        found = before[name].double() - after[name].double()
        limit = 5e-5 * float(gradient.abs().max()) + 3e-7
        assert (found - gradient).abs().max() <= limit, name


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "padded") for name in LOSSES), *(("qrpo", layout) for layout in LAYOUTS)],
)
def test_dpo_first_step_has_the_loss_and_gradient_of_the_formula(
    name: str, layout: str, one_step: dict[str, Any], tmp_path: Path
):
    config = changed(one_step, loss=LOSSES[name], **LAYOUTS[layout])
    dpo(config, tmp_path / "run")
    assert_first_step(tmp_path / "run", config, BATCH)


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [("padding-free", "llama"), ("shared", "llama"), ("shared", "apertus")],
)
def test_dpo_first_step_on_packed_rows_is_the_mean_of_their_pairs(
    layout: str, architecture: str, one_step: dict[str, Any], init_model: Any, tmp_path: Path
):
    settings = {
        **LAYOUTS[layout],
        **PACKED,
        "model.path": str(init_model(tmp_path / "init", architecture=architecture)),
        "training.effective_batch_size": 4,
        "training.per_device_train_batch_size": 2,
    }
    config = changed(one_step, **settings)
    dpo(config, tmp_path / "run")
    [line] = metrics(tmp_path / "run")
    assert line["num_sequences"] > 4
    assert_first_step(tmp_path / "run", config, 4)


def test_dpo_first_step_of_two_ranks_has_the_loss_and_gradient_of_the_formula(
    one_step: dict[str, Any], tmp_path: Path
):
    """Packed, so that the ranks have unequal numbers of pairs."""
    settings = {**PACKED, "training.per_device_train_batch_size": 1, "loss": LOSSES["qrpo"]}
    config = changed(one_step, **settings, **{"training.effective_batch_size": 4})
    codes = run_stage_on_ranks("dpo", config, tmp_path / "run", world_size=2)
    error = rank_file(tmp_path / "run", 0, "error")
    assert codes == [0, 0], error.read_text() if error.exists() else codes
    assert_first_step(tmp_path / "run", config, 4)


def test_dpo_first_step_from_the_reference_has_the_loss_ln_2(
    one_step: dict[str, Any], tmp_path: Path
):
    for index, (name, beta) in enumerate((("dpo", 0.1), ("dpo-norm", 5.0))):
        settings = {"reference": {"logprobs": "computed"}, "loss": {"name": name, "beta": beta}}
        run_dir = tmp_path / str(index)
        dpo(changed(one_step, **settings), run_dir)
        [line] = metrics(run_dir)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert line["kl"] == pytest.approx(0, abs=1e-4)


def test_qrpo_first_step_from_the_reference_has_its_closed_form(
    one_step: dict[str, Any], tmp_path: Path
):
    settings = {"reference": {"logprobs": "computed"}, "loss": {"name": "qrpo", "beta": 0.1}}
    dpo(changed(one_step, **settings), tmp_path / "run")
    beta_z = 0.1 * math.log(0.1) + 1 + 0.1 * math.log1p(-math.exp(-10))
    pairs = Path(one_step["data"]["datasets"][0]["path"])
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    expected = []
    for number in islice(row_stream(len(rows), one_step["seed"]), BATCH):
        row = rows[number]
        for side in ("chosen", "rejected"):
            below = [each <= row[f"{side}_reward"] for each in row["ref_rewards"]]
            expected.append((sum(below) / len(below) - beta_z) ** 2)
    [line] = metrics(tmp_path / "run")
    assert line["loss"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_dpo_accumulated_over_four_steps_trains_what_one_batch_trains(
    one_step: dict[str, Any], tmp_path: Path
):
    lines, weights = [], []
    for micro in (8, 2):
        run_dir = tmp_path / str(micro)
        steps = {"max_steps": 6, "effective_batch_size": 8, "learning_rate": 0.1}
        training = {**one_step["training"], **steps, "per_device_train_batch_size": micro}
        dpo(changed(one_step, training=training), run_dir)
        lines.append(metrics(run_dir))
        weights.append(AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict())
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["num_trained_tokens"] == other["num_trained_tokens"]
    for name, one in weights[0].items():
        assert one.sub(weights[1][name]).abs().max() < 1e-4, name
