"""Preference rows: what `entrypoint dpo` reads, and what a pair was chosen by.

conversation_id   of the prompt's row; with /N for its Nth further pair
source            where the prompt is from
prompt            messages; with tools, where there are any
chosen, rejected  messages of the answers
and for each of the two, where it is known (figures are numbers, logprobs sums in nats):
*_token_ids, ref_*_logprob, *_reward, *_quantile_reward, *_length (tokens), *_is_truncated
prompt_token_ids  of the prompt, up to the first token of the answers
ref_rewards       of the prompt's reference samples
"""

from dataclasses import dataclass
from typing import Any

from post_training.data.branches import (
    BRANCHES,
    ID,
    SIDES,
    conversations_of,
    is_truncated,
    prompt_of,
)
from post_training.data.preference_rows import written_pair
from post_training.stages.select.candidates import Candidate, Candidates, candidates_of
from post_training.stages.select.config import SelectConfig
from post_training.stages.select.strategies import choose_pairs

# Why a prompt has no pair.
DROPPED = {
    "few-references": "fewer reference rewards than min_ref_rewards",
    "few-candidates": "fewer than two branches to choose from",
    "equal-rewards": "all branches to choose from have the same reward",
    "no-pair": "no two branches that the strategy would pair",
}


@dataclass(frozen=True)
class Selected:
    """pairs: preference rows of one prompt, or why there is none (a key of DROPPED). num_samples:
    that there were to choose from; num_cut_off: of them, left out by exclude_truncated."""

    pairs: list[dict[str, Any]] | str
    num_samples: int
    num_cut_off: int


def select_pairs(row: dict[str, Any], config: SelectConfig) -> Selected:
    """Errors: BadRow."""
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
    return [_pair(row, number, pair, found) for number, pair in enumerate(pairs)]


def _pair(
    row: dict[str, Any], number: int, pair: tuple[Candidate, Candidate], found: Candidates
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
        figures = {
            f"{side}_token_ids": ids if "prompt_token_ids" in made else None,
            f"ref_{side}_logprob": branch.get("completion_ref_logprob"),
            f"{side}_reward": candidate.reward,
            f"{side}_quantile_reward": candidate.quantile,
            f"{side}_length": branch.get("completion_length", ids and len(ids)),
            f"{side}_is_truncated": is_truncated(branch),
        }
        made |= {name: figure for name, figure in figures.items() if figure is not None}
    if found.ref_rewards:
        made["ref_rewards"] = found.ref_rewards
    return made
