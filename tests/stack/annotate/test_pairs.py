"""Which branches become pairs: by each strategy, seeded, and never two that are equal."""

import pytest

from post_training.annotate.config import STRATEGIES, StrategyConfig
from post_training.annotate.pairs import Candidate, choose_pairs, quantile_reward


def candidates(*rewards: float, references: tuple[float, ...] | None = None) -> list[Candidate]:
    own = list(rewards if references is None else references)
    return [
        Candidate(index, reward, quantile_reward(reward, own))
        for index, reward in enumerate(rewards)
    ]


def chosen(own: list[Candidate], label: str = "a", **settings) -> list[tuple[float, float]]:
    """The rewards of each pair."""
    pairs = choose_pairs(own, len(own), StrategyConfig(**settings), label)
    return [(one.reward, other.reward) for one, other in pairs]


def test_quantile_reward_counts_the_references_at_most_as_good():
    assert quantile_reward(2.0, [1.0, 2.0, 3.0, 4.0]) == 0.5
    assert quantile_reward(0.0, [1.0, 2.0]) == 0.0
    assert quantile_reward(1.0, []) is None


def test_best_worst_pairs_from_both_ends():
    own = candidates(3, 1, 5, 2, 4)
    assert chosen(own, name="best-worst", num_pairs=9) == [(5, 1), (4, 2)]
    assert chosen(own, name="best-worst") == [(5, 1)]


def test_quantile_buckets_rejects_the_lowest_of_the_worst_and_not_the_seeds_highest():
    # Quantiles 0.1 … 1.0: the worst bucket is {1, 2}, whose head, the seed's choice, is 2.
    own = candidates(*range(1, 11))
    assert chosen(own, name="quantile-buckets") == [(10, 1)]


def test_quantile_buckets_takes_the_middle_where_a_bucket_is_empty():
    references = (1.0, 5.0, 6.0, 7.0, 8.0)
    own = candidates(5.5, 6.5, 7.5, references=references)  # quantiles 0.4, 0.6, 0.8
    pairs = choose_pairs(own, 5, StrategyConfig(name="quantile-buckets"), "a")
    assert [(one.reward, other.reward) for one, other in pairs] == [(7.5, 5.5)]


def test_quantile_buckets_further_pairs_lie_across_the_middle():
    own = candidates(*range(1, 11))
    pairs = choose_pairs(own, 10, StrategyConfig(name="quantile-buckets", num_pairs=4), "a")
    assert [(pairs[0][0].reward, pairs[0][1].reward)] == [(10, 1)]
    assert len(pairs) == 4
    assert all(one.quantile > 0.5 >= other.quantile for one, other in pairs[1:])
    assert len({each for pair in pairs for each in pair}) == 8


def test_quantile_buckets_needs_twice_as_many_branches_as_pairs():
    assert chosen(candidates(1, 2, 3), name="quantile-buckets", num_pairs=2) == []


def test_margin_pairs_differ_by_what_is_asked():
    own = candidates(1, 2, 4, 8, 16)
    for label in "abcdef":
        pairs = chosen(own, label, name="margin", min_margin=3, max_margin=7, num_pairs=3)
        assert pairs
        assert all(3 <= one - other <= 7 for one, other in pairs)
    assert chosen(own, name="margin", min_margin=16) == []


@pytest.mark.parametrize("name", STRATEGIES)
def test_pairs_are_never_equal_and_no_branch_is_in_two(name: str):
    settings = {"name": name, "num_pairs": 5} | ({"min_margin": 0} if name == "margin" else {})
    assert chosen(candidates(*[7] * 10), **settings) == []
    own = candidates(*[0, 1] * 6)
    for label in "abcdef":
        pairs = choose_pairs(own, 12, StrategyConfig(**settings), label)
        assert pairs
        assert all(one.reward > other.reward for one, other in pairs)
        assert len({each for pair in pairs for each in pair}) == 2 * len(pairs)


@pytest.mark.parametrize("name", STRATEGIES)
def test_pairs_depend_on_the_label_alone(name: str):
    settings = {"name": name, "num_pairs": 2} | ({"min_margin": 0} if name == "margin" else {})
    own = candidates(*[0, 1, 2] * 8)

    def pairs(label: str) -> list:
        return choose_pairs(own, 24, StrategyConfig(**settings), label)

    assert pairs("seed 0") == pairs("seed 0")
    assert len({tuple(pairs(f"seed {n}")) for n in range(8)}) > 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "random", "min_margin": 1}, "min_margin is a setting of margin"),
        ({"name": "margin"}, "margin needs a min_margin"),
        ({"name": "margin", "min_margin": 1, "best_quantile": 1}, "of quantile-buckets"),
    ],
)
def test_settings_of_another_strategy_are_refused(settings, problem: str):
    with pytest.raises(ValueError, match=problem):
        StrategyConfig(**settings)
