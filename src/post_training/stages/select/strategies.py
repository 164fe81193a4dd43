"""From the candidates of one prompt to pairs of a better and a worse one.

    best-worst        the best with the worst, the second best with the second worst, …
    quantile-buckets  the seed's: the best of the best bucket with the worst of the worst bucket,
                      or of the middle where a bucket is empty; further pairs at random across 0.5
    random            two at random, again and again, of those that are not equal
    margin            two at random whose rewards differ by min_margin to max_margin

No candidate is in two pairs, and a pair's rewards are never equal. What is random depends on the
label, which names the run's seed and the prompt: not on other prompts, workers or their order.

The seed's code sorted each bucket with the best first and took the *head* of the worst bucket too,
which is the best of the worst: its first pairs were as close as the buckets allowed. Here it is the
last.
"""

from collections.abc import Callable, Iterable, Sequence
from math import inf

from post_training.data.order import permutation
from post_training.stages.select.candidates import Candidate
from post_training.stages.select.config import STRATEGIES, StrategyConfig

Pair = tuple[Candidate, Candidate]
# Of the seed.
_BEST_QUANTILE, _WORST_QUANTILE = 1.0, 0.2


def choose_pairs(
    candidates: Sequence[Candidate], num_ref_rewards: int, config: StrategyConfig, label: str
) -> list[Pair]:
    """(chosen, rejected) of each pair, at most config.num_pairs."""
    order = permutation(len(candidates), f"{label}, candidates")
    shuffled = [candidates[index] for index in order]
    return _STRATEGIES[config.name](shuffled, num_ref_rewards, config)


def _best_worst(candidates: list[Candidate], _: int, config: StrategyConfig) -> list[Pair]:
    # A stable sort: equals stay shuffled.
    ranked = sorted(candidates, key=lambda candidate: -candidate.reward)
    pairs = zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False)
    return _unequal(pairs)[: config.num_pairs]


def _quantile_buckets(
    candidates: list[Candidate], num_ref_rewards: int, config: StrategyConfig
) -> list[Pair]:
    if len(candidates) < 2 * config.num_pairs:
        return []
    best_from = config.best_quantile if config.best_quantile is not None else _BEST_QUANTILE
    worst_to = config.worst_quantile if config.worst_quantile is not None else _WORST_QUANTILE
    worst_to = max(worst_to, 1 / num_ref_rewards)
    ranked = sorted(candidates, key=lambda candidate: -candidate.reward)
    best = [each for each in ranked if each.quantile >= best_from]
    worst = [each for each in ranked if each.quantile <= worst_to and each not in best]
    middle = [each for each in ranked if each not in best and each not in worst]
    first = _unequal([((best or middle or worst)[0], (worst or middle or best)[-1])])
    if not first:
        return []
    left = [each for each in candidates if each not in first[0]]
    upper = [each for each in left if each.quantile > 0.5]
    lower = [each for each in left if each.quantile <= 0.5]
    return (first + _unequal(zip(upper, lower, strict=False)))[: config.num_pairs]


def _random(candidates: list[Candidate], _: int, config: StrategyConfig) -> list[Pair]:
    return _within(candidates, 0, inf, config.num_pairs)


def _margin(candidates: list[Candidate], _: int, config: StrategyConfig) -> list[Pair]:
    assert config.min_margin is not None
    most = inf if config.max_margin is None else config.max_margin
    return _within(candidates, config.min_margin, most, config.num_pairs)


def _within(candidates: list[Candidate], least: float, most: float, num_pairs: int) -> list[Pair]:
    """Each candidate in its turn with the next whose reward differs by so much."""
    left, pairs = list(candidates), []
    while left and len(pairs) < num_pairs:
        one = left.pop(0)
        for other in left:
            if least <= abs(one.reward - other.reward) <= most and one.reward != other.reward:
                pairs += _unequal([(one, other)])
                left.remove(other)
                break
    return pairs


def _unequal(pairs: Iterable[Pair]) -> list[Pair]:
    """The better one first; without pairs that nothing tells apart."""
    return [
        (one, other) if one.reward > other.reward else (other, one)
        for one, other in pairs
        if one.reward != other.reward
    ]


_STRATEGIES: dict[str, Callable[[list[Candidate], int, StrategyConfig], list[Pair]]] = {
    "best-worst": _best_worst,
    "quantile-buckets": _quantile_buckets,
    "random": _random,
    "margin": _margin,
}
assert set(_STRATEGIES) == set(STRATEGIES)
