"""Each loss and its gradient against the formula in float64; the partition functions of QRPO
against numerical integrals."""

import math
from functools import cache

import mpmath
import numpy as np
import pytest
import torch

from post_training.train.config import PreferenceLossConfig
from post_training.train.dpo_loss import (
    Answers,
    PairMetrics,
    beta_log_z,
    implicit_rewards,
    pair_losses,
    transformed,
)

LOSSES = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "dpo-smoothed": {"name": "dpo", "beta": 0.3, "label_smoothing": 0.2},
    "dpo-per-length": {"name": "dpo", "beta": 5.0, "normalize_beta_by_length": True},
    "dpo-norm": {"name": "dpo-norm", "beta": 5.0},
    "ipo": {"name": "ipo", "beta": 0.2},
    "ipo-per-length": {"name": "ipo", "beta": 0.2, "normalize_beta_by_length": True},
    "hinge": {"name": "hinge", "beta": 0.1},
    **{
        f"qrpo-{transform}": {"name": "qrpo", "beta": 0.4, "quantile_transform": transform}
        for transform in ("identity", "square", "sqrt", "log", "normal")
    },
    "qrpo-per-length": {
        "name": "qrpo",
        "beta": 4.0,
        "normalize_beta_by_length": True,
        "normalize_loss_by_length": True,
    },
}
NUM_PAIRS, NUM_REFERENCES = 9, 4


def answers(seed: int) -> Answers:
    numbers = np.random.default_rng(seed)
    logprobs = -numbers.uniform(1, 400, NUM_PAIRS)
    values = (
        logprobs,
        logprobs + numbers.normal(0, 6, NUM_PAIRS),
        numbers.choice([1, 7, 60], NUM_PAIRS),
        numbers.integers(0, NUM_REFERENCES + 1, NUM_PAIRS) / NUM_REFERENCES,
        np.full(NUM_PAIRS, NUM_REFERENCES),
    )
    tensors = [torch.tensor(each, dtype=torch.float64) for each in values]
    tensors[0].requires_grad_()
    return Answers(*tensors)


@cache
def log_z(beta: float, transform: str) -> float:
    """By numerical integration of exp(f(t) / β), with its largest value taken out."""
    with mpmath.workdps(25):
        f = {
            "identity": lambda t: t,
            "square": lambda t: t**2,
            "sqrt": mpmath.sqrt,
            "log": mpmath.log,
        }[transform]
        top = f(mpmath.mpf(1)) if transform != "log" else 0
        points = [0, *(1 - mpmath.mpf(2) ** -n for n in range(1, 13)), 1]
        total = mpmath.quad(lambda t: mpmath.exp((f(t) - top) / beta), points)
        return float(mpmath.log(total) + top / mpmath.mpf(beta))


def naive(chosen: Answers, rejected: Answers, loss: dict) -> list[float]:
    """One pair after the other, from the formulas of dpo_loss.py, in Python's floats."""
    inverse_normal = {0.25: -0.6744897501960817, 0.5: 0.0, 0.75: 0.6744897501960817}
    results = []
    for index in range(NUM_PAIRS):
        terms = []
        for side in (chosen, rejected):
            length = float(side.lengths[index])
            per_length = loss.get("normalize_beta_by_length") or loss["name"] == "dpo-norm"
            beta = loss["beta"] / length if per_length else loss["beta"]
            ratio = side.logprobs[index].item() - float(side.ref_logprobs[index])
            terms.append((beta, beta * ratio, length, float(side.quantiles[index])))
        margin = terms[0][1] - terms[1][1]
        match loss["name"]:
            case "dpo" | "dpo-norm":
                epsilon = loss.get("label_smoothing", 0.0)
                value = (1 - epsilon) * math.log1p(math.exp(-margin))
                value += epsilon * math.log1p(math.exp(margin))
            case "hinge":
                value = max(0.0, 1 - margin)
            case "ipo":
                value = (margin / loss["beta"] - 1 / (2 * loss["beta"])) ** 2
            case "qrpo":
                value = 0.0
                transform = loss.get("quantile_transform", "identity")
                for beta, reward, length, quantile in terms:
                    if transform == "normal":
                        moved = min(max(quantile, 1 / NUM_REFERENCES), 1 - 1 / NUM_REFERENCES)
                        target, z = inverse_normal[moved], 1 / (2 * beta**2)
                    else:
                        moved = (
                            max(quantile, 1 / NUM_REFERENCES) if transform == "log" else quantile
                        )
                        target = {"identity": moved, "square": moved**2, "sqrt": moved**0.5}.get(
                            transform
                        )
                        target = math.log(moved) if transform == "log" else target
                        z = log_z(beta, transform)
                    square = (target - beta * z - reward) ** 2
                    value += square / (length if loss.get("normalize_loss_by_length") else 1) / 2
        results.append(value)
    return results


@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_are_those_of_the_formulas(name: str):
    chosen, rejected = answers(1), answers(2)
    found = pair_losses(chosen, rejected, PreferenceLossConfig(**LOSSES[name]))
    assert found.tolist() == pytest.approx(naive(chosen, rejected, LOSSES[name]), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_have_the_gradient_of_the_formulas(name: str):
    """By central differences of the naive values: 1e-5 either way."""
    chosen, rejected = answers(1), answers(2)
    pair_losses(chosen, rejected, PreferenceLossConfig(**LOSSES[name])).sum().backward()
    for side in (chosen, rejected):
        for index in range(0, NUM_PAIRS, 4):
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    side.logprobs[index] += step
                    values.append(naive(chosen, rejected, LOSSES[name])[index])
                    side.logprobs[index] -= step
            slope = (values[0] - values[1]) / 2e-5
            assert float(side.logprobs.grad[index]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("transform", ["identity", "square", "sqrt", "log"])
@pytest.mark.parametrize("beta", [3e-4, 0.001, 0.1, 0.5, 1.0, 5.0, 300.0])
def test_beta_log_z_is_the_integral(transform: str, beta: float):
    found = float(beta_log_z(torch.tensor([beta], dtype=torch.float64), transform))
    assert found == pytest.approx(beta * log_z(beta, transform), rel=1e-9, abs=1e-12)


def test_beta_log_z_of_normal_is_that_of_a_normal_distribution():
    # Φ⁻¹(t) of a uniform t is standard normal: E exp(x / β) = exp(1 / (2β²)).
    assert float(beta_log_z(torch.tensor([0.25]), "normal")) == pytest.approx(2.0)


def test_beta_log_z_of_identity_keeps_the_term_that_the_reference_code_drops():
    dropped = [beta * (math.log(beta) + 1 / beta) for beta in (0.1, 0.5)]
    found = beta_log_z(torch.tensor([0.1, 0.5], dtype=torch.float64), "identity").tolist()
    assert [one - other for one, other in zip(found, dropped, strict=True)] == pytest.approx(
        [-4.540e-6, -0.07271], rel=1e-3
    )


def test_transformed_moves_quantiles_only_where_the_transform_is_not_finite():
    quantiles = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    four = torch.full((4,), 4.0, dtype=torch.float64)
    assert transformed(quantiles, four, "identity").tolist() == [0.0, 0.25, 0.5, 1.0]
    assert transformed(quantiles, four, "log").tolist() == pytest.approx(
        [math.log(0.25), math.log(0.25), math.log(0.5), 0.0]
    )
    normal = transformed(quantiles, four, "normal").tolist()
    assert normal == pytest.approx([-0.67448975, -0.67448975, 0.0, 0.67448975])


def test_pair_losses_at_the_reference_have_their_closed_form():
    start = [answers(seed) for seed in (1, 2)]
    start = [
        Answers(each.ref_logprobs, each.ref_logprobs, each.lengths, each.quantiles, each.lengths)
        for each in start
    ]
    assert pair_losses(
        *start, PreferenceLossConfig(name="dpo", beta=5.0)
    ).tolist() == pytest.approx([math.log(2)] * NUM_PAIRS, abs=1e-12)
    assert (
        pair_losses(*start, PreferenceLossConfig(name="ipo", beta=0.5)).tolist()
        == [1.0] * NUM_PAIRS
    )
    found = pair_losses(*start, PreferenceLossConfig(name="qrpo", beta=0.1))
    beta_z = 0.1 * (math.log(0.1) + 10 + math.log1p(-math.exp(-10)))
    expected = [((each.quantiles - beta_z) ** 2).tolist() for each in start]
    means = [(one + other) / 2 for one, other in zip(*expected, strict=True)]
    assert found.tolist() == pytest.approx(means, abs=1e-12)


def test_implicit_rewards_of_dpo_norm_are_per_token():
    side = answers(1)
    found = implicit_rewards(side, PreferenceLossConfig(name="dpo-norm", beta=5.0))
    expected = 5 * (side.logprobs - side.ref_logprobs) / side.lengths
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_pair_metrics_are_means_over_the_pairs_of_all_and_of_each_dataset():
    chosen, rejected = answers(1), answers(2)
    loss = PreferenceLossConfig(name="dpo", beta=0.3)
    metrics = PairMetrics(loss, ["some", "none", "others"])
    is_other = torch.arange(NUM_PAIRS) >= 4
    sums = metrics.sums(chosen, rejected, 2 * is_other.long())
    found = metrics.figures({name: float(value) for name, value in sums.items()})
    margins = (implicit_rewards(chosen, loss) - implicit_rewards(rejected, loss)).detach()
    for name, own in (
        ("rewards", is_other == is_other), ("sources/some", ~is_other), ("sources/others", is_other)
    ):  # fmt: skip
        assert found[f"{name}/margins"] == pytest.approx(float(margins[own].mean()))
        assert found[f"{name}/accuracies"] == pytest.approx(
            float((margins[own] > 0).float().mean())
        )
    assert "sources/none/margins" not in found
    ratios = torch.cat([chosen.log_ratios, rejected.log_ratios])
    assert found["kl"] == pytest.approx(-float(ratios.detach().mean()))


def test_pair_metrics_of_equal_rewards_count_as_wrong():
    side = answers(1)
    same = Answers(
        side.ref_logprobs, side.ref_logprobs, side.lengths, side.quantiles, side.num_ref_rewards
    )
    metrics = PairMetrics(PreferenceLossConfig(name="dpo", beta=0.3), ["one"])
    sums = metrics.sums(same, same, torch.zeros(NUM_PAIRS, dtype=torch.int64))
    assert float(sums["rewards/accuracies"]) == 0


def test_loss_config_refuses_settings_of_another_loss():
    with pytest.raises(ValueError, match="quantile_transform is a setting of qrpo"):
        PreferenceLossConfig(name="dpo", beta=0.1, quantile_transform="log")
    with pytest.raises(ValueError, match="label_smoothing is a setting of dpo"):
        PreferenceLossConfig(name="ipo", beta=0.1, label_smoothing=0.1)
