"""A mixture of experts: its router's loss is transformers' own, and RUN/model generates."""

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from helpers.tiny_models import make_model
from post_training.data.order import row_stream
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION

COEFFICIENT = 0.5
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


@pytest.fixture(scope="module")
def experts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of a family, beside the tokenizer of `model`."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        shape = {"intermediate_size": 32, "head_dim": 8, **FAMILIES[family]}
        made = make_model(family, model, folder, **shape, router_aux_loss_coef=COEFFICIENT)
        for name, weights in made.named_parameters():
            if "gate.weight" in name:  # routers that prefer some experts
                weights.data.mul_(50)
        made.save_pretrained(folder)
        return folder

    return make


def batches(run_dir: Path, seed: int, micro: int) -> list[list[Any]]:
    rows = PreparedDataset.open(run_dir / "data")
    read = [rows.read(index) for index in islice(row_stream(len(rows), seed), 8)]
    return [read[start : start + micro] for start in range(0, 8, micro)]


def of_transformers(
    folder: Path, run_dir: Path, seed: int, micro: int, coefficient: float
) -> tuple[float, float, float]:
    """(loss, router's loss, gradient norm) of the first step in float64, by transformers' own
    forward pass of each padded micro-batch."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    divided = batches(run_dir, seed, micro)
    num_tokens = sum(int((row.kinds[1:] == COMPLETION).sum()) for each in divided for row in each)
    loss = routers = torch.zeros((), dtype=torch.float64)
    for rows in divided:
        longest = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for index, row in enumerate(rows):
            length = len(row.ids)
            ids[index, :length] = torch.from_numpy(row.ids.astype(np.int64))
            mask[index, :length] = 1
            trained = torch.from_numpy(row.kinds == COMPLETION)
            labels[index, :length][trained] = ids[index, :length][trained]
        found = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        loss = (
            loss
            + torch.nn.functional.cross_entropy(
                found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            / num_tokens
        )
        routers = routers + found.aux_loss / len(divided)
    total = loss + coefficient * routers
    total.backward()
    norm = math.sqrt(sum(float((each.grad**2).sum()) for each in model.parameters()
                         if each.grad is not None))  # fmt: skip
    return float(total.detach()), float(routers.detach()), norm


@pytest.fixture
def one_step(config: dict[str, Any]) -> dict[str, Any]:
    return changed(config, **{"training.max_steps": 1, "logging.logging_steps": 1})


@pytest.mark.parametrize("micro", [2, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_loss_and_its_gradient_are_those_of_transformers(
    family: str, micro: int, experts: Any, one_step: dict[str, Any], tmp_path: Path
):
    folder = experts(family)
    settings = {"model.path": str(folder), "training.per_device_train_batch_size": micro}
    sft(changed(one_step, **settings), tmp_path / "run")
    loss, router_loss, grad_norm = of_transformers(
        folder, tmp_path / "run", one_step["seed"], micro, COEFFICIENT
    )
    [line] = metrics(tmp_path / "run")
    assert line["router_aux_loss"] == pytest.approx(router_loss, rel=2e-6)
    assert line["loss"] == pytest.approx(loss, rel=2e-6)
    assert line["grad_norm"] == pytest.approx(grad_norm, rel=2e-5)
    assert line["loss"] - line["completion_loss"] > 0.5 * COEFFICIENT  # it is no trifle


def test_padding_of_packed_rows_is_none_of_the_routers_tokens(
    experts: Any, one_step: dict[str, Any], tmp_path: Path
):
    """One micro-batch has all the sequences, whether they are packed or padded."""
    folder = experts("qwen3_moe")
    losses = []
    for name, settings in (
        ("padded", {"training.per_device_train_batch_size": 8}),
        ("packed", {"training.padding_free": True, "training.per_device_train_batch_size": 8}),
    ):
        run = tmp_path / name
        sft(changed(one_step, **{"model.path": str(folder), **settings}), run)
        [line] = metrics(run)
        losses.append(line["router_aux_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_coefficient_of_0_trains_no_routers_loss(
    experts: Any, one_step: dict[str, Any], tmp_path: Path
):
    folder = experts("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "router_aux_loss_coef": 0.0}))
    sft(changed(one_step, **{"model.path": str(folder)}), tmp_path / "run")
    [line] = metrics(tmp_path / "run")
    assert "router_aux_loss" not in line
    assert line["loss"] == pytest.approx(line["completion_loss"], rel=1e-6)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_trained_experts_generate_in_plain_transformers(
    lora: dict[str, Any] | None, experts: Any, one_step: dict[str, Any], tmp_path: Path
):
    folder = experts("qwen3_moe")
    sft(changed(one_step, **{"model.path": str(folder), "lora": lora}), tmp_path / "run")
    before, after = (
        json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "run/model")
    )
    assert after["output_router_logits"] == before["output_router_logits"] is False
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    drawn = trained.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert drawn.shape[0] == 2
