"""From the branches of an annotated row to preference rows, which `entrypoint dpo` reads.

conversation_id   of the prompt's row; with /N for its Nth further pair
source            where the prompt is from
prompt            messages; with tools, where there are any
chosen, rejected  messages of the answers
and for each of the two, where it is known (rewards are numbers, logprobs sums in nats):
*_token_ids, ref_*_logprob, *_reward, *_quantile_reward, *_length (tokens), *_is_truncated
prompt_token_ids  of the prompt, up to the first token of the answers
ref_rewards       of the prompt's reference samples
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from post_training.annotate.config import STRATEGIES, SelectConfig, StrategyConfig
from post_training.data.branches import (
    BRANCHES,
    ID,
    conversations_of,
    is_truncated,
    prompt_of,
)
from post_training.data.formats.values import is_number
from post_training.data.order import permutation
from post_training.data.preference_rows import written_pair
from post_training.data.rows import SIDES, BadRow

# Why a prompt has no pair.
DROPPED = {
    "few-references": "fewer reference rewards than min_ref_rewards",
    "few-candidates": "fewer than two branches to choose from",
    "equal-rewards": "all branches to choose from have the same reward",
    "no-pair": "no two branches that the strategy would pair",
}


@dataclass(frozen=True)
class Candidate:
    """index: of the branch in its row. quantile: the share of the reference rewards that are ≤
    reward; None where there are none."""

    index: int
    reward: float
    quantile: float | None


@dataclass(frozen=True)
class Candidates:
    """ref_rewards: of the reference samples, in their order. num_cut_off: branches that are no
    candidates as they were cut off."""

    candidates: list[Candidate]
    ref_rewards: list[float]
    num_cut_off: int


Pair = tuple[Candidate, Candidate]
# The seed's, for quantile-buckets.
_BEST_QUANTILE, _WORST_QUANTILE = 1.0, 0.2


@dataclass(frozen=True)
class Selected:
    """pairs: preference rows of one prompt, or why there is none (a key of DROPPED).
    num_samples: that there were to choose from; num_cut_off: of them, left out by
    exclude_truncated."""

    pairs: list[dict[str, Any]] | str
    num_samples: int
    num_cut_off: int


def select_pairs(row: dict[str, Any], config: SelectConfig) -> Selected:
    """The pairs of a prompt's row. Errors: BadRow for a branch without the reward that decides."""
    found = candidates_of(row, config)
    pairs = _pairs_or_reason(row, found, config)
    return Selected(pairs, len(found.candidates) + found.num_cut_off, found.num_cut_off)


def _pairs_or_reason(
    row: dict[str, Any], found: Candidates, config: SelectConfig
) -> list[dict[str, Any]] | str:
    if len(found.ref_rewards) < config.min_ref_rewards:
        return "few-references"
    if len(found.candidates) < 2:
        return "few-candidates"
    if len({candidate.reward for candidate in found.candidates}) == 1:
        return "equal-rewards"
    label = f"pairs, seed {config.seed}, prompt {row[ID]}"
    pairs = choose_pairs(found.candidates, len(found.ref_rewards), config.strategy, label)
    if not pairs:
        return "no-pair"
    return [_preference_row(row, number, pair, found) for number, pair in enumerate(pairs)]


def _preference_row(
    row: dict[str, Any], number: int, pair: Pair, found: Candidates
) -> dict[str, Any]:
    prompt = prompt_of(row).messages
    conversations = conversations_of(row)
    answers = [conversations[candidate.index] for candidate in pair]
    messages = tuple(answer.messages[len(prompt) :] for answer in answers)
    # Answers that can be checked declare a function more than their prompt.
    tools = max((answer.tools for answer in answers), key=len)
    made: dict[str, Any] = {
        ID: f"{row[ID]}/{number}" if number else row[ID],
        "source": row.get("dataset_source"),
        **written_pair(prompt, messages, tools),
    }
    branches = [row[BRANCHES][candidate.index] for candidate in pair]
    prompts = [branch.get("prompt_token_ids", row.get("prompt_token_ids")) for branch in branches]
    if prompts[0] is not None and prompts[0] == prompts[1]:
        made["prompt_token_ids"] = prompts[0]
    for side, candidate, branch in zip(SIDES, pair, branches, strict=True):
        ids = branch.get("completion_token_ids")
        known = {
            f"{side}_token_ids": ids if "prompt_token_ids" in made else None,
            f"ref_{side}_logprob": branch.get("completion_ref_logprob"),
            f"{side}_reward": candidate.reward,
            f"{side}_quantile_reward": candidate.quantile,
            f"{side}_length": branch.get("completion_length", ids and len(ids)),
            f"{side}_is_truncated": is_truncated(branch),
        }
        made |= {name: value for name, value in known.items() if value is not None}
    if found.ref_rewards:
        made["ref_rewards"] = found.ref_rewards
    return made


def candidates_of(row: dict[str, Any], config: SelectConfig) -> Candidates:
    """The branches that a pair may be made of. Errors: BadRow for one without the reward that
    decides."""
    branches = row[BRANCHES]
    rewards = [_reward(branch, index, config.reward) for index, branch in enumerate(branches)]
    references = [bool(branch.get("is_reference_completion")) for branch in branches]
    ref_rewards = [reward for reward, own in zip(rewards, references, strict=True) if own]
    ref_rewards = ref_rewards[: config.num_ref_rewards]
    wanted = {"reference": (True,), "offline": (False,), "both": (True, False)}[config.samples]
    asked_for = [index for index, own in enumerate(references) if own in wanted]
    whole = [
        index
        for index in asked_for
        if not (config.exclude_truncated and is_truncated(branches[index]))
    ]
    candidates = [
        Candidate(index, rewards[index], quantile_reward(rewards[index], ref_rewards))
        for index in whole
    ]
    return Candidates(candidates, ref_rewards, len(asked_for) - len(whole))


def quantile_reward(reward: float, ref_rewards: list[float]) -> float | None:
    """R_q = (1/n) Σ_i 1[r_i ≤ reward] over the n reference rewards (https://arxiv.org/abs/2507.08068)."""
    if not ref_rewards:
        return None
    return sum(each <= reward for each in ref_rewards) / len(ref_rewards)


def _reward(branch: dict[str, Any], index: int, name: str | None) -> float:
    key = f"{BRANCHES}[{index}].rewards"
    rewards = branch.get("rewards")
    if not isinstance(rewards, dict) or not rewards:
        raise BadRow("columns", f"{key}: there are none; run `entrypoint rewards` first")
    if name is None:
        if len(rewards) > 1:
            names = ", ".join(rewards)
            problem = f"several, so the setting `reward` has to say which of {names} decides"
            raise BadRow("columns", f"{key}: {problem}")
        [name] = rewards
    if not is_number(rewards.get(name)):
        raise BadRow("columns", f"{key}: no number {name!r} (there is {', '.join(rewards)})")
    return float(rewards[name])


def choose_pairs(
    candidates: Sequence[Candidate], num_ref_rewards: int, config: StrategyConfig, label: str
) -> list[Pair]:
    """(chosen, rejected) of each pair, at most config.num_pairs.

    best-worst        the best with the worst, the second best with the second worst, …
    quantile-buckets  the seed's: the best of the best bucket with the worst of the worst bucket, or
                      of the middle where a bucket is empty; further pairs at random across 0.5
    random            two at random, again and again, of those that are not equal
    margin            two at random whose rewards differ by min_margin to max_margin

    No candidate is in two pairs, and a pair's rewards are never equal. What is random depends on
    the label, which names the run's seed and the prompt: not on other prompts, workers or their
    order.
    """
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
    # The last of the worst bucket. The seed's code took its head, which is the best of the worst:
    # its first pairs were as close as the buckets allowed.
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
