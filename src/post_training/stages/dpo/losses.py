"""The losses of preference training, each a function of what a pair's two answers have.

Of one answer y to a prompt x, |y| its completion tokens (those that are trained):

    Δ = log π_θ(y|x) − log π_ref(y|x), summed over the completion tokens
    β_y = β, or β / |y| with normalize_beta_by_length (always in dpo-norm)

Of a pair, with m = β_c Δ_c − β_r Δ_r of the chosen and the rejected answer:

    dpo, dpo-norm   −(1 − ε) log σ(m) − ε log σ(−m)     arXiv 2305.18290; ε: label_smoothing
    hinge           max(0, 1 − m)                       arXiv 2305.10425
    ipo             ((m − 1/2) / β)²                    arXiv 2310.12036, eq. 17: with one β for
                                                        both, (Δ_c − Δ_r − 1/(2β))²
    qrpo            mean over both answers of (f(R) − β_y log Z(β_y) − β_y Δ)²     2507.08068

R is the share of the prompt's n reference rewards that are ≤ the answer's own. It is uniform on
[0, 1] for answers of the reference, so Z(β) = ∫₀¹ exp(f(t) / β) dt has a closed form for each f.
The logarithm is not finite at R = 0, nor Φ⁻¹ at 0 and 1: there R is moved to 1/n and (n − 1)/n, as
the method says; nothing else is ever clamped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from post_training.stages.dpo.config import LossConfig

# The grid of `_log_dawson`: its error is about exp(−(π / (2 · spacing))²), here 1e-27.
_SPACING, _NUM_TERMS = 0.2, 36


@dataclass(frozen=True)
class Answers:
    """The same answer (chosen, or rejected) of N pairs; each a floating tensor [N].

    logprobs, ref_logprobs: sums over the completion tokens, nats. lengths: of completions, in
    tokens. quantiles: R, and num_ref_rewards: n; only read by qrpo.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    lengths: Tensor
    quantiles: Tensor
    num_ref_rewards: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """Δ [N]."""
        return self.logprobs - self.ref_logprobs


def betas(answers: Answers, loss: LossConfig) -> Tensor:
    """β_y [N]."""
    scale = 1 / answers.lengths if loss.beta_is_per_length else torch.ones_like(answers.lengths)
    return loss.beta * scale


def implicit_rewards(answers: Answers, loss: LossConfig) -> Tensor:
    """β_y Δ [N]: the reward, up to a term of the prompt, whose best policy is π_θ."""
    return betas(answers, loss) * answers.log_ratios


def pair_losses(chosen: Answers, rejected: Answers, loss: LossConfig) -> Tensor:
    """The loss of each pair [N], in the dtype of the answers; nothing is averaged over pairs."""
    if loss.name == "qrpo":
        return (_qrpo(chosen, loss) + _qrpo(rejected, loss)) / 2
    margins = implicit_rewards(chosen, loss) - implicit_rewards(rejected, loss)
    match loss.name:
        case "dpo" | "dpo-norm":
            epsilon = loss.label_smoothing
            return -(1 - epsilon) * logsigmoid(margins) - epsilon * logsigmoid(-margins)
        case "hinge":
            return (1 - margins).relu()
        case "ipo":
            return ((margins - 0.5) / loss.beta) ** 2


def _qrpo(answers: Answers, loss: LossConfig) -> Tensor:
    beta = betas(answers, loss)
    targets = transformed(answers.quantiles, answers.num_ref_rewards, loss.quantile_transform)
    targets = targets - beta_log_z(beta, loss.quantile_transform)
    errors = (targets - beta * answers.log_ratios) ** 2
    return errors / answers.lengths if loss.normalize_loss_by_length else errors


def transformed(quantiles: Tensor, num_ref_rewards: Tensor, transform: str) -> Tensor:
    """f(R) [N]."""
    moved = moved_quantiles(quantiles, num_ref_rewards, transform)
    match transform:
        case "identity":
            return moved
        case "square":
            return moved**2
        case "sqrt":
            return moved.sqrt()
        case "log":
            return moved.log()
        case "normal":
            return torch.special.ndtri(moved)
    raise AssertionError(transform)


def moved_quantiles(quantiles: Tensor, num_ref_rewards: Tensor, transform: str) -> Tensor:
    """R [N], moved to where f is finite: to ≥ 1/n for log, to [1/n, (n − 1)/n] for normal."""
    if transform == "log":
        return torch.maximum(quantiles, 1 / num_ref_rewards)
    if transform == "normal":
        least = 1 / num_ref_rewards
        return torch.minimum(torch.maximum(quantiles, least), 1 - least)
    return quantiles


def beta_log_z(beta: Tensor, transform: str) -> Tensor:
    """β log ∫₀¹ exp(f(t) / β) dt, exact, of each β [N].

    Computed in float64, and with exp(1/β) taken out: it overflows below β = 1/709.

        identity   log β + 1/β + log(1 − e^(−1/β))
        square     log(√β D(1/√β)) + 1/β        D: Dawson's function, e^(−x²) ∫₀ˣ e^(t²) dt
        sqrt       log(2β (1 − β + β e^(−1/β))) + 1/β
        log        log(β / (β + 1))
        normal     1 / (2β²)
    """
    b = beta.double()
    match transform:
        case "identity":
            result = 1 + b * (b.log() + torch.log(-torch.expm1(-1 / b)))
        case "square":
            result = 1 + b * (b.log() / 2 + _log_dawson(b.rsqrt()))
        case "sqrt":
            result = 1 + b * (math.log(2) + b.log() + torch.log1p(b * torch.expm1(-1 / b)))
        case "log":
            result = -b * torch.log1p(1 / b)
        case "normal":
            result = 1 / (2 * b)
        case _:
            raise AssertionError(transform)
    return result.to(beta.dtype)


def _log_dawson(x: Tensor) -> Tensor:
    """log D(x) of x > 0, float64 [N], by Rybicki's sum over a grid of odd multiples of h:
    D(x) = (1/√π) Σ exp(−(x − nh)²) / n (Numerical Recipes, 3rd edition, 6.9).
    """
    nearest = 2 * torch.round(x / (2 * _SPACING))
    odd = torch.arange(1 - _NUM_TERMS, _NUM_TERMS, 2, dtype=x.dtype, device=x.device)
    distances = (x - nearest * _SPACING)[..., None] - odd * _SPACING
    total = (torch.exp(-(distances**2)) / (nearest[..., None] + odd)).sum(-1)
    return torch.log(total) - math.log(math.pi) / 2
