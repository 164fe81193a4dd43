"""Preference rows, and the stage run on them in this process."""

from pathlib import Path
from typing import Any

from post_training.stages.context import StageContext

QUESTION = "What is {a} + {b}?"


def preference_rows(number: int) -> list[dict[str, Any]]:
    """Sums with a right and a wrong answer, of many lengths, some after an earlier turn."""
    rows = []
    for a in range(number):
        b = a * a % 17
        prompt = [{"role": "user", "content": QUESTION.format(a=a, b=b)}]
        if a % 3 == 0:
            earlier = [
                {"role": "user", "content": "Hello" + "!" * (a % 5)},
                {"role": "assistant", "content": "Ask."},
            ]
            prompt = earlier + prompt
        rows.append(
            {
                "prompt": prompt,
                "chosen": [
                    {"role": "assistant", "content": f"{a} + {b} = {a + b}" + "." * (a % 4)}
                ],
                "rejected": [{"role": "assistant", "content": f"{a + b + 1}" + " so" * (a % 6)}],
                "chosen_reward": 1.0,
                "rejected_reward": -float(a % 3),
                "ref_rewards": [0.5, -1.0, 1.0, -3.0],
            }
        )
    return rows


def dpo(config: dict[str, Any], run_dir: Path, *, resuming: bool = False) -> Any:
    """Run the stage in this process; its Result."""
    from post_training.train.config import DpoConfig
    from post_training.train.dpo import run

    run_dir.mkdir(parents=True, exist_ok=True)
    inputs = {"data.datasets[0].path": "a"}
    context = StageContext(run_dir, resuming=resuming, input_fingerprints=inputs)
    return run(DpoConfig.model_validate(config), context)
