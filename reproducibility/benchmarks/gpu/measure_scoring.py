"""Step c: reference logprobs of 8 billion parameters: ten completions of 128 tokens on each prompt
of 512, by `entrypoint logprobs`' scorer, beside plain forwards.

Plain: a forward a completion, with a log-softmax of full logits in float32, as the seed's systems
had it; and the ten completions of a prompt in one batch.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from made_up import SHAPES, random_model
from step import start
from training import reset_peak, synchronize

# Sequences a second of the first system, on a GH200.
SEED_SEQUENCES_PER_S = 11.4
COMPLETIONS = 10

Scores = list[list[float]]
Work = list[tuple[list[int], list[list[int]]]]


def main() -> None:
    step = start(__doc__)
    from post_training.models.device import be_deterministic

    be_deterministic()
    shape = SHAPES[step.pick("8B", "tiny")]
    work = _work(shape["vocab_size"], *step.pick((4, 512, 128), (2, 24, 8)))
    model = random_model(shape, step.device, torch.bfloat16)
    found: dict[str, Scores] = {}
    ways = {
        "plain, a forward a completion": lambda: _plain(model, work, batched=False),
        "plain, ten completions a batch": lambda: _plain(model, work, batched=True),
        "ours, a prompt at a time": lambda: _ours(model, work, prompts_per_batch=1),
        "ours, prompts of similar length together": lambda: _ours(
            model, work, prompts_per_batch=len(work)
        ),
    }
    # Ours installs another output layer, which is the old one outside of its own calls.
    for name, way in ways.items():
        step.attempt(name, lambda name=name, way=way: _measure(name, way, found))
    plain = found.get("plain, a forward a completion")
    for name, scores in found.items():
        if plain is None or scores is plain:
            continue
        pairs = [
            (a, b)
            for mine, theirs in zip(scores, plain, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ]
        length = len(work[0][1][0])
        worst = max(abs(a - b) for a, b in pairs) / length
        # In 16 bits two ways to multiply the same numbers differ by about this much a token.
        step.check(f"{name}: as plain", worst <= 3e-2, nats_per_token=worst, tolerance=3e-2)


def _work(vocabulary: int, prompts: int, prompt: int, completion: int) -> Work:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(0, vocabulary, (length,), generator=generator).tolist()

    return [(ids(prompt), [ids(completion) for _ in range(COMPLETIONS)]) for _ in range(prompts)]


def _measure(name: str, way: Callable[[], Scores], found: dict[str, Scores]) -> dict[str, Any]:
    from post_training.train.throughput import peak_memory_bytes

    way()  # memory is allocated, kernels are chosen
    reset_peak()
    synchronize()
    began = time.perf_counter()
    found[name] = way()
    synchronize()
    seconds = time.perf_counter() - began
    rate = sum(map(len, found[name])) / seconds
    return {
        "sequences_per_s": round(rate, 2),
        "times_the_seed": round(rate / SEED_SEQUENCES_PER_S, 2),
        "peak_gib": round(peak_memory_bytes() / 2**30, 2),
    }


@torch.no_grad()
def _plain(model: Any, work: Work, *, batched: bool) -> Scores:
    scores = []
    for prompt, completions in work:
        size = len(completions) if batched else 1
        own: list[float] = []
        for start_at in range(0, len(completions), size):
            rows = [prompt + each for each in completions[start_at : start_at + size]]
            ids = torch.tensor(rows, device=model.device)
            logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            asked = logprobs[:, len(prompt) - 1 : -1].gather(2, ids[:, len(prompt) :, None])
            own += asked.double().sum((1, 2)).tolist()
        scores.append(own)
    return scores


def _ours(model: Any, work: Work, *, prompts_per_batch: int) -> Scores:
    from post_training.models.score import Asked, LogprobScorer

    scorer = LogprobScorer(model, max_batch_tokens=32768, prompts_per_batch=prompts_per_batch)
    found = scorer.score([Asked(prompt, completions) for prompt, completions in work])
    return [[each.logprob for each in of_prompt] for of_prompt in found]


if __name__ == "__main__":
    main()
