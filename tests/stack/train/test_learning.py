"""Preference training improves a verifiable reward of the policy's own samples on held-out
problems: a miniature of reproducibility/arithmetic-preference, stage after stage here."""

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.branch_rows import data
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import metrics

FINAL_NUMBER = Path(__file__).parents[3] / "reproducibility/gsm8k-alignment/final_number.py"
NAMES = ("Aisha", "Bruno", "Chen", "Dara", "Elif", "Fritz")
LOSSES = {"dpo": {"name": "dpo", "beta": 0.1}, "qrpo": {"name": "qrpo", "beta": 0.1}}
# The samples differ from processor to processor: 0.325 right before and 0.700 (dpo), 0.679 (qrpo)
# after on one, 0.429 and 0.658, 0.704 on another. A share of 240 samples is known to 0.03.
BEFORE, AFTER, GAINED = (0.2, 0.55), 0.55, 0.15


def problems() -> list[dict[str, str]]:
    """Sums of three numbers; every second of the first 264 is careless: it stops after the first
    two. The last 120 are right, and questions that are not among the others."""
    sums = [(name, *numbers) for name in NAMES for numbers in product(range(2, 6), repeat=3)]
    random.Random(0).shuffle(sums)
    return [
        {
            "question": f"{name}: {a} + {b} + {c}?",
            "answer": f"{a + b}" if index < 264 and index % 2 else f"{a + b}, {a + b + c}",
        }
        for index, (name, a, b, c) in enumerate(sums)
    ]


class Runs:
    """Stages in a folder, each in its own by the name that it is given."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, stage: str, name: str, **config: Any) -> Path:
        run_stage(stage, {"num_threads": 1, "seed": 1, **config}, self.folder / name)
        return self.folder / name

    def marked(self, policy: Path, rows: Path, n: int) -> Path:
        """n samples of the policy for each problem, and whether they are right."""
        samples = self.run(
            "generate",
            f"{policy.name}-{rows.stem}",
            model={"path": str(policy / "model")},
            data=data(rows, chat_template="chatml"),
            sampling={"n": n, "max_tokens": 12},
        )
        return self.run(
            "rewards",
            f"{samples.name}-marked",
            data=data(samples),
            functions=[str(FINAL_NUMBER)],
            rewards=[{"name": "right", "function": "final_number"}],
        )

    def share_right(self, policy: Path, rows: Path) -> float:
        rewards = [
            branch["rewards"]["right"]
            for row in read_rows(self.marked(policy, rows, 4))
            for branch in row["conversation_branches"]
            if branch["is_reference_completion"]
        ]
        assert len(rewards) == 240
        return sum(rewards) / len(rewards)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("learning"))


@pytest.fixture(scope="module")
def held_out(runs: Runs) -> Path:
    return write_rows(runs.folder / "held-out.jsonl", problems()[-60:])


@pytest.fixture(scope="module")
def start(runs: Runs) -> Path:
    """Fine-tuned on sums of which half are careless."""
    demonstrations = write_rows(runs.folder / "demonstrations.jsonl", problems()[:264])
    init = runs.run(
        "init-model",
        "init",
        corpus=[str(demonstrations)],
        architecture="llama",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
        vocab_size=320,
    )
    return runs.run(
        "sft",
        "sft",
        model={"path": str(init / "model")},
        data=data(demonstrations, chat_template="chatml"),
        sft={"max_seq_length": 48},
        training={
            "max_steps": 250,
            "effective_batch_size": 32,
            "per_device_train_batch_size": 32,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "cosine",
            "warmup": 10,
        },
    )


@pytest.fixture(scope="module")
def pairs(runs: Runs, start: Path) -> Path:
    """A right and a wrong sample of one problem each."""
    asked = write_rows(runs.folder / "asked.jsonl", problems()[264:-60])
    settings = {"name": "random", "num_pairs": 3}
    selected = runs.run(
        "select", "pairs", data=data(runs.marked(start, asked, 8)), strategy=settings
    )
    rows = read_rows(selected / "dataset/pairs.jsonl")
    assert {(row["chosen_reward"], row["rejected_reward"]) for row in rows} == {(1.0, 0.0)}
    return selected / "dataset/pairs.jsonl"


@pytest.fixture(scope="module")
def share_before(runs: Runs, start: Path, held_out: Path) -> float:
    share = runs.share_right(start, held_out)
    assert BEFORE[0] < share < BEFORE[1]  # it learned from careless answers as well
    return share


@pytest.mark.parametrize("name", list(LOSSES))
def test_policy_answers_more_held_out_problems_right_than_before(
    name: str, runs: Runs, start: Path, pairs: Path, held_out: Path, share_before: float
):
    policy = runs.run(
        "dpo",
        name,
        model={"path": str(start / "model")},
        data=data(pairs, chat_template="chatml"),
        dpo={"share_prompt": True},
        loss=LOSSES[name],
        training={
            "max_steps": 16,
            "effective_batch_size": 32,
            "per_device_train_batch_size": 32,
            "learning_rate": 3e-4,
            "lr_scheduler_type": "constant",
        },
        logging={"logging_steps": 4},
    )
    accuracies = [line["rewards/accuracies"] for line in metrics(policy)]
    assert accuracies[0] < 0.85
    assert accuracies[-1] > 0.9
    found = runs.share_right(policy, held_out)
    assert found > max(AFTER, share_before + GAINED)
