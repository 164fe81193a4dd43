"""The branches of an annotated row as candidates for pairs."""

from dataclasses import dataclass
from typing import Any

from post_training.data.branches import BRANCHES, is_truncated
from post_training.data.formats.values import is_number
from post_training.data.rows import BadRow
from post_training.stages.select.config import SelectConfig


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


def candidates_of(row: dict[str, Any], config: SelectConfig) -> Candidates:
    """Errors: BadRow for a branch without the reward that decides."""
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
            raise BadRow("columns", f"{key}: several, so the setting `reward` has to say which of "
                         f"{names} decides")  # fmt: skip
        [name] = rewards
    if not is_number(rewards.get(name)):
        raise BadRow("columns", f"{key}: no number {name!r} (there is {', '.join(rewards)})")
    return float(rewards[name])
