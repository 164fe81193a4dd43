"""Step d: DPO steps of a model of 8 billion parameters, with the prompt once a pair and twice.

A pair a step: a prompt of 2048 tokens and two answers of 512; LoRA, as full weights with their
optimizer and both answers' activations are what step b measures already.
"""

from typing import Any

import torch
from made_up import SHAPES, MadeUpPairs, random_model
from step import Step, start
from training import Clock, free, speeds, train_dpo

NUM_STEPS = 3


def main() -> None:
    step = start(__doc__)
    from post_training.models.device import be_deterministic

    be_deterministic()
    shape = SHAPES[step.pick("8B", "tiny")]
    prompt, completion = step.pick((2048, 512), (64, 16))
    pairs = MadeUpPairs(64, prompt, completion, shape["vocab_size"])
    for share in (True, False):
        name = f"dpo, prompt {'shared' if share else 'twice'}"
        step.attempt(name, lambda share=share: _measure(step, shape, pairs, share))
        free()


def _measure(step: Step, shape: dict[str, Any], pairs: MadeUpPairs, share: bool) -> dict[str, Any]:
    model, clock = random_model(shape, step.device, torch.bfloat16), Clock(NUM_STEPS)
    folder = step.folder / ("shared" if share else "twice")
    train_dpo(model, pairs, folder, clock, share_prompt=share, gradient_checkpointing=True)
    answers = 2 * pairs.completion
    length = pairs.prompt + pairs.completion
    # What the two sequences need, whichever way they are laid out: tokens/s and MFU compare.
    figures = speeds(
        model, clock, tokens=2 * pairs.prompt + answers, trained=answers, squares=2 * length**2
    )
    return {**figures, "pairs_per_s": round(1 / clock.step_s, 3)}


if __name__ == "__main__":
    main()
