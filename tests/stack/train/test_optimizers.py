"""Every optimizer: its update against float64, and its state over a checkpoint."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import run_sft_on_ranks
from post_training.train.arguments import optimizer_class_and_arguments
from post_training.train.optim import OPTIMIZERS
from post_training.train.training_config import TrainingConfig

RATE, DECAY, STEPS = 0.01, 0.1, 12


def make(name: str, parameters: Any, num_steps: int = STEPS, **settings: Any) -> Any:
    training = TrainingConfig(
        max_steps=num_steps,
        effective_batch_size=1,
        learning_rate=RATE,
        optimizer=name,
        optimizer_args=settings,
    )
    found, arguments = optimizer_class_and_arguments(training, num_steps)
    return found([{"params": parameters, "weight_decay": DECAY}], **arguments)


def gradients(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(4, 3)) * 10.0 ** (step % 3 - 1)


def trained(name: str, **settings: Any) -> np.ndarray:
    """The weights after STEPS steps on `gradients`, in float32."""
    weights = torch.nn.Parameter(torch.from_numpy(gradients(-1 % 100)).float())
    optimizer = make(name, [weights], **settings)
    for step in range(1, STEPS + 1):
        weights.grad = torch.from_numpy(gradients(step)).float()
        optimizer.step()
    return weights.detach().numpy()


def start() -> np.ndarray:
    return gradients(-1 % 100).astype(np.float32).astype(np.float64)


def adamw(betas: tuple[float, float], eps: float) -> np.ndarray:
    """https://arxiv.org/abs/1711.05101, algorithm 2, in float64."""
    (beta1, beta2), weights = betas, start()
    m, v = np.zeros_like(weights), np.zeros_like(weights)
    for t in range(1, STEPS + 1):
        g = gradients(t)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        weights = weights - RATE * (update + DECAY * weights)
    return weights


def ademamix(
    betas: tuple[float, float], beta3: float, alpha: float, t_alpha_beta3: int, eps: float
) -> np.ndarray:
    """https://arxiv.org/abs/2409.03137, section 3 (schedulers: equations 6 and 7), in float64."""
    (beta1, beta2), weights = betas, start()
    m1, m2, v = (np.zeros_like(weights) for _ in range(3))
    for t in range(1, STEPS + 1):
        share = t / t_alpha_beta3
        alpha_t = min(share * alpha, alpha)
        # In steps of half-life, from that of beta1 to that of beta3.
        log1, log3 = math.log(beta1), math.log(beta3)
        beta3_t = min(math.exp(log1 * log3 / ((1 - share) * log3 + share * log1)), beta3)
        g = gradients(t)
        m1 = beta1 * m1 + (1 - beta1) * g
        m2 = beta3_t * m2 + (1 - beta3_t) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (m1 / (1 - beta1**t) + alpha_t * m2) / (np.sqrt(v / (1 - beta2**t)) + eps)
        weights = weights - RATE * (update + DECAY * weights)
    return weights


def lion(betas: tuple[float, float]) -> np.ndarray:
    """https://arxiv.org/abs/2302.06675, algorithm 2, in float64."""
    (beta1, beta2), weights = betas, start()
    m = np.zeros_like(weights)
    for t in range(1, STEPS + 1):
        g = gradients(t)
        update = np.sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
        weights = weights - RATE * (update + DECAY * weights)
    return weights


@pytest.mark.parametrize("name", ["adamw", "adamw_torch"])
def test_adamw_updates_as_the_paper_says(name: str):
    found = trained(name, betas=[0.8, 0.95], eps=1e-6)
    np.testing.assert_allclose(found, adamw((0.8, 0.95), 1e-6), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("t_alpha_beta3", [None, 1, 5, 40])
def test_ademamix_updates_as_the_paper_says(t_alpha_beta3: int | None):
    settings = {} if t_alpha_beta3 is None else {"t_alpha_beta3": t_alpha_beta3}
    found = trained("ademamix", **settings)
    expected = ademamix((0.9, 0.999), 0.999, 8.0, t_alpha_beta3 or STEPS, 1e-8)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


def test_ademamix_without_slow_average_is_adamw():
    found = trained("ademamix", alpha=0)
    np.testing.assert_allclose(found, adamw((0.9, 0.999), 1e-8), rtol=2e-6, atol=1e-6)


def test_lion_updates_as_the_paper_says():
    found = trained("lion", betas=[0.8, 0.95])
    np.testing.assert_allclose(found, lion((0.8, 0.95)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_on_from_its_saved_state_bit_for_bit(name: str, tmp_path: Path):
    def steps(weights: Any, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            weights.grad = torch.from_numpy(gradients(step)).float()
            optimizer.step()

    weights = torch.nn.Parameter(torch.from_numpy(gradients(0)).float())
    optimizer = make(name, [weights])
    before = weights.detach().clone()
    steps(weights, optimizer, range(1, 7))
    torch.save((weights.data, copy.deepcopy(optimizer.state_dict())), tmp_path / "state.pt")
    steps(weights, optimizer, range(7, 13))
    assert not torch.equal(weights, before)

    saved, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = torch.nn.Parameter(saved)
    resumed = make(name, [again])
    resumed.load_state_dict(state)
    steps(again, resumed, range(7, 13))
    assert torch.equal(again, weights)


@pytest.mark.parametrize(
    "settings",
    [
        {"training.optimizer": "ademamix", "training.learning_rate": 1e-3},
        {"training.optimizer": "lion", "training.learning_rate": 1e-3},
        {"model.dtype": "bfloat16"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_sft_with_other_averages_killed_and_resumed_ends_in_the_same_bytes(
    settings: dict[str, Any], config: dict[str, Any], tmp_path: Path
):
    other = changed(config, **settings)
    assert run_sft_on_ranks(other, tmp_path / "whole") == [0]
    point = "before the random state is saved"
    assert run_sft_on_ranks(other, tmp_path / "killed", kill_at=point) == [-9]
    assert run_sft_on_ranks(other, tmp_path / "killed", resuming=True) == [0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("name", ["adafactor", "sgd", "rmsprop", "adagrad"])
def test_sft_learns_with_every_other_optimizer(
    name: str, config: dict[str, Any], model: Path, tmp_path: Path
):
    settings = {
        "training.optimizer": name,
        "training.optimizer_args": {"momentum": 0.9} if name == "sgd" else {},
        "training.learning_rate": 0.1 if name == "sgd" else 0.01,
        "model.path": str(model),
    }
    sft(changed(config, **settings), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]


def test_sft_weight_decay_shrinks_matrices_and_nothing_else(
    init_model: Any, config: dict[str, Any], tmp_path: Path
):
    folder = init_model(tmp_path / "init", architecture="apertus")
    settings = {
        "model.path": str(folder),
        "training.max_steps": 1,
        "training.warmup": 0,
        # So large that decay is all that a step does, and takes everything at once.
        "training.learning_rate": 1e-6,
        "training.lr_scheduler_type": "constant",
        "training.weight_decay": 1e6,
    }
    sft(changed(config, **settings), tmp_path / "run")
    before, after = (
        load_file(path / "model.safetensors") for path in (folder, tmp_path / "run" / "model")
    )
    decayed = {
        re.sub(r"layers\.\d+", "layers", name)
        for name, weights in after.items()
        if weights.abs().max() < 1e-3 * before[name].abs().max()
    }
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    assert decayed == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{name}.weight" for name in names),
    }
    assert any("alpha_p" in name for name in after)
