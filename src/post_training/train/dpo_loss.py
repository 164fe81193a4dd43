"""The losses of preference training, their micro-batches, and what is told of pairs.

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
The logarithm is not finite at R = 0, nor Φ⁻¹ at 0 and 1: there R is moved to 1/n and (n − 1)/n,
as the method says; nothing else is ever clamped.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch import Tensor
from torch.nn.functional import logsigmoid

from post_training.data.pairs.dataset import NUM_REF_REWARDS, QUANTILE, Pair, PairDataset
from post_training.data.prepared.dataset import PreparedRow
from post_training.data.rows import COMPLETION, SIDES
from post_training.models.head import IGNORED
from post_training.train.config import PreferenceLossConfig
from post_training.train.loss import MicroBatch, Scalar, round_up

# The grid of `_log_dawson`: its error is about exp(−(π / (2 · spacing))²), here 1e-27.
_SPACING, _NUM_TERMS = 0.2, 36


@dataclass(frozen=True)
class Answers:
    """The same answer (chosen, or rejected) of N pairs.

    logprobs, ref_logprobs: sums over the completion tokens, nats. lengths: of completions, in
    tokens. quantiles: R, and num_ref_rewards: n; only read by qrpo.
    """

    logprobs: Float[Tensor, " N"]
    ref_logprobs: Float[Tensor, " N"]
    lengths: Float[Tensor, " N"]
    quantiles: Float[Tensor, " N"]
    num_ref_rewards: Float[Tensor, " N"]

    @property
    def log_ratios(self) -> Float[Tensor, " N"]:
        """Δ."""
        return self.logprobs - self.ref_logprobs


def betas(answers: Answers, loss: PreferenceLossConfig) -> Float[Tensor, " N"]:
    """β_y."""
    scale = 1 / answers.lengths if loss.beta_is_per_length else torch.ones_like(answers.lengths)
    return loss.beta * scale


def implicit_rewards(answers: Answers, loss: PreferenceLossConfig) -> Float[Tensor, " N"]:
    """β_y Δ: the reward, up to a term of the prompt, whose best policy is π_θ."""
    return betas(answers, loss) * answers.log_ratios


def pair_losses(
    chosen: Answers, rejected: Answers, loss: PreferenceLossConfig
) -> Float[Tensor, " N"]:
    """The loss of each pair, in the dtype of the answers; nothing is averaged over pairs."""
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


def _qrpo(answers: Answers, loss: PreferenceLossConfig) -> Float[Tensor, " N"]:
    beta = betas(answers, loss)
    targets = transformed(answers.quantiles, answers.num_ref_rewards, loss.quantile_transform)
    targets = targets - beta_log_z(beta, loss.quantile_transform)
    errors = (targets - beta * answers.log_ratios) ** 2
    return errors / answers.lengths if loss.normalize_loss_by_length else errors


def transformed(
    quantiles: Float[Tensor, " N"], num_ref_rewards: Float[Tensor, " N"], transform: str
) -> Float[Tensor, " N"]:
    """f(R)."""
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


def moved_quantiles(
    quantiles: Float[Tensor, " N"], num_ref_rewards: Float[Tensor, " N"], transform: str
) -> Float[Tensor, " N"]:
    """R, moved to where f is finite: to ≥ 1/n for log, to [1/n, (n − 1)/n] for normal."""
    if transform == "log":
        return torch.maximum(quantiles, 1 / num_ref_rewards)
    if transform == "normal":
        least = 1 / num_ref_rewards
        return torch.minimum(torch.maximum(quantiles, least), 1 - least)
    return quantiles


def beta_log_z(beta: Float[Tensor, " N"], transform: str) -> Float[Tensor, " N"]:
    """β log ∫₀¹ exp(f(t) / β) dt, exact, of each β.

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


def _log_dawson(x: Float64[Tensor, " N"]) -> Float64[Tensor, " N"]:
    """log D(x) of x > 0, by Rybicki's sum over a grid of odd multiples of h:
    D(x) = (1/√π) Σ exp(−(x − nh)²) / n (Numerical Recipes, 3rd edition, 6.9).
    """
    nearest = 2 * torch.round(x / (2 * _SPACING))
    odd = torch.arange(1 - _NUM_TERMS, _NUM_TERMS, 2, dtype=x.dtype, device=x.device)
    distances = (x - nearest * _SPACING)[..., None] - odd * _SPACING
    total = (torch.exp(-(distances**2)) / (nearest[..., None] + odd)).sum(-1)
    return torch.log(total) - math.log(math.pi) / 2


@dataclass(frozen=True, kw_only=True)
class PairBatch(MicroBatch):
    """N pairs; an answer's number is i where pair i chose it, and N + i where it rejected it.

    Only completion tokens are targets.

    answers: the number of the answer that the target is of; 0 where there is none.
    ref_logprobs, lengths, quantiles, num_ref_rewards: of chosen and rejected.
    sources: the number of the dataset that each pair is of.
    numbers: of the pairs in the dataset.
    """

    answers: Int64[Tensor, "B T"]
    ref_logprobs: Float64[Tensor, "2 N"]
    lengths: Float64[Tensor, "2 N"]
    quantiles: Float64[Tensor, "2 N"]
    num_ref_rewards: Float64[Tensor, "2 N"]
    sources: Int64[Tensor, " N"]
    numbers: tuple[int, ...]

    @property
    def num_pairs(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class _Block:
    """Tokens that see none but each other. branches: 0 for what all later tokens
    see, 1 and 2 for what only the same branch sees."""

    ids: Int64[np.ndarray, " T"]
    positions: Int64[np.ndarray, " T"]
    branches: Int64[np.ndarray, " T"]
    targets: Int64[np.ndarray, " T"]
    answers: Int64[np.ndarray, " T"]
    squared_lengths: int


class PairCollator:
    """From rows of pairs to a micro-batch, in one of three layouts.

        padded     two rows for each pair, prompt + chosen and prompt + rejected, with an attention
                   mask
        packed     the same sequences one after another; position ids start again with each, and
                   there is no mask
        shared     prompt, chosen and rejected one after another: both answers see the prompt, and
                   not each other, by a mask of [T, T]; both have the positions they would have
                   alone

    In the last, the prompt's last token stands before each answer once more: it predicts the first
    token of both, and a position has one target.

            prompt    … p   p c c c    p r r        positions  0 … P−2, P−1 …, P−1 …

    ref_logprobs: of every pair of the dataset.
    packed: rows are laid out without padding between sequences.
    padding_free: the same, and one row of all of them.
    additive_mask: the mask of shared prompts as numbers to add (eager), not as booleans (sdpa).
    """

    def __init__(
        self,
        dataset: PairDataset,
        ref_logprobs: Float64[np.ndarray, "S 2"],
        *,
        pad_token_id: int,
        packed: bool,
        padding_free: bool,
        share_prompt: bool,
        additive_mask: bool,
        pad_to_multiple_of: int | None = None,
    ):
        self.dataset = dataset
        self.ref_logprobs = ref_logprobs
        self.pad_token_id = pad_token_id
        self.packed = packed or padding_free
        self.padding_free = padding_free
        self.share_prompt = share_prompt
        self.additive_mask = additive_mask
        self.pad_to_multiple_of = pad_to_multiple_of or 1

    def __call__(self, items: list[dict[str, int]]) -> dict[str, PairBatch]:
        numbers = tuple(item["row"] for item in items)
        return {"batch": self.batch([self.dataset.read(number) for number in numbers], numbers)}

    def batch(self, pairs_of_rows: list[list[Pair]], rows: tuple[int, ...]) -> PairBatch:
        pairs = list(chain.from_iterable(pairs_of_rows))
        laid_out = self._rows(pairs_of_rows, len(pairs))
        longest = max(sum(len(block.ids) for block in row) for row in laid_out)
        size = (len(laid_out), round_up(longest, self.pad_to_multiple_of))
        ids, positions = np.full(size, self.pad_token_id, np.int64), np.zeros(size, np.int64)
        targets, answers = np.full(size, IGNORED, np.int64), np.zeros(size, np.int64)
        # Tokens see those of the same block, in the same branch or in none; -1 is padding.
        blocks, branches = np.full(size, -1), np.zeros(size, np.int64)
        for index, row in enumerate(laid_out):
            start = 0
            for number, block in enumerate(row):
                span = (index, slice(start, start + len(block.ids)))
                ids[span], positions[span] = block.ids, block.positions
                targets[span], answers[span] = block.targets, block.answers
                blocks[span], branches[span] = number, block.branches
                start += len(block.ids)
            positions[index, start:] = np.arange(size[1] - start)
        inputs = {"input_ids": torch.from_numpy(ids)}
        if self.packed or self.share_prompt:
            inputs["position_ids"] = torch.from_numpy(positions)
        if self.share_prompt:
            inputs["attention_mask"] = self._mask(blocks, branches)
        elif not self.packed:
            inputs["attention_mask"] = torch.from_numpy((blocks >= 0).astype(np.int64))
        figures = np.stack([pair.figures for pair in pairs], 1)  # [2, N, 3]
        pair_numbers = tuple(pair.number for pair in pairs)
        trained = torch.from_numpy(answers[targets != IGNORED])
        lengths = torch.bincount(trained, minlength=2 * len(pairs)).view(2, -1)
        return PairBatch(
            inputs=inputs,
            targets=torch.from_numpy(targets),
            answers=torch.from_numpy(answers),
            ref_logprobs=torch.from_numpy(self.ref_logprobs[list(pair_numbers)].T.copy()),
            lengths=lengths.double(),
            quantiles=torch.from_numpy(figures[:, :, QUANTILE].copy()),
            num_ref_rewards=torch.from_numpy(figures[:, :, NUM_REF_REWARDS].copy()),
            sources=torch.tensor([pair.source for pair in pairs]),
            is_token=torch.from_numpy(blocks >= 0),
            numbers=pair_numbers,
            rows=rows,
            num_tokens=int((blocks >= 0).sum()),
            sum_of_squared_lengths=sum(block.squared_lengths for row in laid_out for block in row),
        )

    def _rows(self, pairs_of_rows: list[list[Pair]], num_pairs: int) -> list[list[_Block]]:
        numbers = iter(range(num_pairs))
        rows = [
            [block for pair in pairs for block in self._blocks(pair, next(numbers), num_pairs)]
            for pairs in pairs_of_rows
        ]
        if self.padding_free:
            return [[block for row in rows for block in row]]
        if self.packed or self.share_prompt:
            return rows
        return [[block] for row in rows for block in row]

    def _blocks(self, pair: Pair, number: int, num_pairs: int) -> Iterator[_Block]:
        sides = ((pair.chosen, number), (pair.rejected, num_pairs + number))
        if not self.share_prompt or not len(pair.prefix):
            for answer, index in sides:
                yield _sequence(pair.prefix, answer, index)
            return
        kept = len(pair.prefix) - 1
        nothing = np.full(kept, IGNORED)
        shared = _Block(
            pair.prefix[:-1].astype(np.int64),
            np.arange(kept),
            np.zeros(kept, int),
            nothing,
            np.zeros(kept, int),
            0,
        )
        parts = [shared]
        for branch, (answer, index) in enumerate(sides, 1):
            alone = _sequence(pair.prefix[-1:], answer, index)
            parts.append(
                _Block(
                    alone.ids,
                    kept + alone.positions,
                    np.full(len(alone.ids), branch),
                    alone.targets,
                    alone.answers,
                    (kept + len(alone.ids)) ** 2,
                )
            )
        yield _Block(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("ids", "positions", "branches", "targets", "answers")
            ),
            squared_lengths=sum(part.squared_lengths for part in parts) - kept**2,
        )

    def _mask(
        self, blocks: Int64[np.ndarray, "B T"], branches: Int64[np.ndarray, "B T"]
    ) -> Bool[Tensor, "B 1 T T"] | Float32[Tensor, "B 1 T T"]:
        """Whether position q (the third dimension) sees k."""
        block, branch = torch.from_numpy(blocks), torch.from_numpy(branches)
        sees = (block[:, :, None] == block[:, None]) & (
            (branch[:, None] == 0) | (branch[:, :, None] == branch[:, None])
        )
        sees = sees.tril()[:, None]
        if not self.additive_mask:
            return sees
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)


def _sequence(prefix: Int32[np.ndarray, " prefix"], answer: PreparedRow, index: int) -> _Block:
    """A prompt and one answer, as they are alone."""
    ids = np.concatenate([prefix, answer.ids]).astype(np.int64)
    length = len(ids)
    targets = np.full(length, IGNORED, np.int64)
    trained = np.zeros(length, bool)  # by the position that predicts
    trained[: length - 1] = np.concatenate(
        [np.zeros(len(prefix), bool), answer.kinds == COMPLETION]
    )[1:]
    targets[:-1][trained[:-1]] = ids[1:][trained[:-1]]
    return _Block(
        ids,
        np.arange(length),
        np.zeros(length, np.int64),
        targets,
        np.where(trained, index, 0),
        length**2,
    )


class PairMetrics:
    """What metrics.jsonl says of the pairs of a step, beside the loss.

        rewards/chosen, rewards/rejected   β_y Δ, means over the pairs
        rewards/margins                    the difference of the two
        rewards/accuracies                 the share of pairs whose chosen answer has the higher one
        logps/chosen, logps/rejected       log π_θ of an answer, nats
        kl                                 mean of −Δ over both answers: an estimate of
                                           KL(π_ref ‖ π_θ) where the answers are the reference's own
        lengths/chosen, lengths/rejected   trained tokens
        quantiles/chosen, …/rejected       mean R of the answers that have one
        quantiles/moved                    the share of answers whose R was moved to where f is
                                           finite
        sources/NAME/margins, …/accuracies the same, of each dataset, where there are several

    All are means over the global batch, whatever the ranks and micro-batches.

    sources: names of the datasets.
    """

    def __init__(self, loss: PreferenceLossConfig, sources: Sequence[str]):
        self._loss = loss
        self._sources = tuple(sources) if len(sources) > 1 else ()

    @torch.no_grad()
    def sums(
        self, chosen: Answers, rejected: Answers, sources: Int64[Tensor, " N"]
    ) -> dict[str, Scalar]:
        """Of one micro-batch; they add up over micro-batches and ranks."""
        margins = implicit_rewards(chosen, self._loss) - implicit_rewards(rejected, self._loss)
        is_higher = (margins > 0).double()
        sums: dict[str, Scalar] = {"num_pairs": float(len(margins))}
        for name, answers in zip(SIDES, (chosen, rejected), strict=True):
            has_quantile = ~answers.quantiles.isnan()
            sums[f"rewards/{name}"] = implicit_rewards(answers, self._loss).sum()
            sums[f"logps/{name}"] = answers.logprobs.sum()
            sums[f"lengths/{name}"] = answers.lengths.sum()
            sums[f"kl/{name}"] = -answers.log_ratios.sum()
            sums[f"quantiles/{name}"] = answers.quantiles.nansum()
            sums[f"num_quantiles/{name}"] = has_quantile.double().sum()
            sums[f"num_moved/{name}"] = self._num_moved(answers)
        sums["rewards/margins"] = margins.sum()
        sums["rewards/accuracies"] = is_higher.sum()
        for index, name in enumerate(self._sources):
            own = (sources == index).to(margins.device)
            sums[f"sources/{name}/num_pairs"] = own.double().sum()
            sums[f"sources/{name}/margins"] = (own * margins).sum()
            sums[f"sources/{name}/accuracies"] = (own * is_higher).sum()
        return sums

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """From the sums over the global batch."""
        num_pairs = sums["num_pairs"]
        means = (
            *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
            *("logps/chosen", "logps/rejected", "lengths/chosen", "lengths/rejected"),
        )
        figures = {name: sums[name] / num_pairs for name in means}
        figures["kl"] = (sums["kl/chosen"] + sums["kl/rejected"]) / (2 * num_pairs)
        for name in SIDES:
            if number := sums[f"num_quantiles/{name}"]:
                figures[f"quantiles/{name}"] = sums[f"quantiles/{name}"] / number
        if self._moves:
            moved = sums["num_moved/chosen"] + sums["num_moved/rejected"]
            figures["quantiles/moved"] = moved / (2 * num_pairs)
        for name in self._sources:
            if number := sums[f"sources/{name}/num_pairs"]:
                for figure in ("margins", "accuracies"):
                    key = f"sources/{name}/{figure}"
                    figures[key] = sums[key] / number
        return figures

    @property
    def _moves(self) -> bool:
        return self._loss.name == "qrpo" and self._loss.quantile_transform in ("log", "normal")

    def _num_moved(self, answers: Answers) -> Scalar:
        if not self._moves:
            return 0.0
        moved = moved_quantiles(
            answers.quantiles, answers.num_ref_rewards, self._loss.quantile_transform
        )
        return (moved != answers.quantiles).double().sum()
