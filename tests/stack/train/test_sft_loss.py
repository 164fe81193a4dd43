"""Each loss and its gradient against the formula in float64, however the batch is laid out.

The gradient is read off the weights: one step of plain SGD with learning rate 1.
"""

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft
from helpers.stage_process import run_sft_on_ranks
from post_training.data.order import row_stream
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT
from post_training.train.config import SftLossConfig
from post_training.train.sft_loss import Sums, factors, sequence_weights

LOSSES = {
    "sft": {"name": "sft"},
    "plw": {"name": "plw", "prompt_loss_weight": 0.3},
    "completions": {"name": "plw"},
    "ln-plw": {"name": "ln-plw", "prompt_loss_weight": 0.3},
    "irl": {"name": "irl", "prompt_loss_weight": 0.3, "irl_lambda": 0.4, "irl_gamma": 0.9},
}
BATCH = 8


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of one to three turns, some answers with another weight than 1, of many lengths."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = []
    for number in range(24):
        messages = []
        for turn in range(number % 3 + 1):
            messages += [
                {"role": "user", "content": f"{number} plus {turn}" + "?" * (number % 4 + 1)},
                {
                    "role": "assistant",
                    "content": f"{number + turn}" + " ok" * (number % 5),
                    "weight": [1, 0.5, 2][(number + turn) % 3],
                },
            ]
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def one_step(config: dict[str, Any], model: Path, chats: Path) -> dict[str, Any]:
    settings = {
        "model.path": str(model),
        "data.datasets": [{"path": str(chats)}],
        "training": {
            "max_steps": 1,
            "effective_batch_size": BATCH,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "optimizer": "sgd",
            "max_grad_norm": 0,
        },
        "logging.logging_steps": 1,
        "sft.max_seq_length": 128,
    }
    return changed(config, **settings)


def sequences(run_dir: Path, seed: int, num_rows: int) -> Iterator[tuple[Any, Any, Any]]:
    """(ids, kinds, weights) of every sequence in the first rows of the run."""
    dataset = PreparedDataset.open(run_dir / "data")
    assert dataset.has_weights
    for index in islice(row_stream(len(dataset), seed), num_rows):
        row = dataset.read(index)
        ends = np.cumsum(row.lengths)[:-1]
        parts = (np.split(values, ends) for values in (row.ids, row.kinds, row.weights))
        yield from zip(*parts, strict=True)


def reference(
    run_dir: Path, model_path: Path, seed: int, num_rows: int, loss: dict[str, Any], level: bool
) -> tuple[float, dict[str, Any]]:
    """(loss, gradients by name) of the first step, from the formulas of sft_loss.py in float64, one
    sequence after another."""
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=torch.float64, attn_implementation="eager"
    )
    w = 1.0 if loss["name"] == "sft" else loss.get("prompt_loss_weight", 0.0)
    spans = []  # of each sequence: (Σ_P ℓ, |P|, Σ_C a ℓ, Σ_C a)
    for ids, kinds, weights in sequences(run_dir, seed, num_rows):
        logits_TV = model(torch.tensor(ids[None].astype(int))).logits[0]
        prompt, completion, num_prompt, weight = 0.0, 0.0, 0, 0.0
        for t in range(len(ids) - 1):
            value = logits_TV[t].logsumexp(-1)
            logprob = logits_TV[t, int(ids[t + 1])] - value
            term = -logprob
            if loss["name"] == "irl":
                following = logits_TV[t + 1].logsumexp(-1) if t + 1 < len(ids) - 1 else 0.0
                term = (
                    term
                    + loss["irl_lambda"] * (value + logprob - loss["irl_gamma"] * following) ** 2
                )
            if kinds[t + 1] == PROMPT:
                prompt, num_prompt = prompt + term, num_prompt + 1
            elif kinds[t + 1] == COMPLETION:
                completion = completion + float(weights[t + 1]) * term
                weight += float(weights[t + 1])
        spans.append((prompt, num_prompt, completion, weight))

    def combined(prompt: Any, num_prompt: int, completion: Any, weight: float) -> Any:
        if loss["name"] in ("sft", "plw"):
            return (w * prompt + completion) / (w * num_prompt + weight)
        return (w * prompt / num_prompt if num_prompt else 0.0) + completion / weight

    if level:
        total = sum(combined(*span) for span in spans) / len(spans)
    else:
        total = combined(*(sum(parts) for parts in zip(*spans, strict=True)))
    total.backward()
    return float(total.detach()), {name: p.grad for name, p in model.named_parameters()}


def assert_first_step(
    run_dir: Path, config: dict[str, Any], loss: dict[str, Any], level: bool, num_rows: int
) -> None:
    model_path = Path(config["model"]["path"])
    expected, gradients = reference(run_dir, model_path, config["seed"], num_rows, loss, level)
    [line] = metrics(run_dir)
    assert line["loss"] == pytest.approx(expected, rel=3e-6)
    before = AutoModelForCausalLM.from_pretrained(model_path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run_dir / "model").state_dict()
    for name, gradient in gradients.items():
        found = before[name].double() - after[name].double()
        limit = 3e-5 * float(gradient.abs().max()) + 3e-7
        assert (found - gradient).abs().max() <= limit, name


@pytest.mark.parametrize(
    ("name", "level", "layout", "micro"),
    [
        *product(LOSSES, [False, True], ["padded"], [8]),
        *product(LOSSES, [False], ["padded"], [2]),
        *product(LOSSES, [True], ["padding-free"], [2]),
        *product(["plw", "irl"], [False], ["padding-free"], [8]),
    ],
)
def test_first_step_has_the_loss_and_the_gradient_of_the_formula(
    name: str, level: bool, layout: str, micro: int, one_step: dict[str, Any], tmp_path: Path
):
    settings = {
        "loss": {**LOSSES[name], "sequence_level_loss": level},
        "training.per_device_train_batch_size": micro,
        "training.padding_free": layout == "padding-free",
    }
    config = changed(one_step, **settings)
    sft(config, tmp_path / "run")
    assert_first_step(tmp_path / "run", config, LOSSES[name], level, BATCH)


@pytest.mark.parametrize(
    ("name", "level", "micro", "padding_free"),
    [*product(LOSSES, [False, True], [4], [False]), *product(LOSSES, [True], [1], [True])],
)
def test_packed_rows_have_the_loss_and_the_gradient_of_their_sequences_alone(
    name: str, level: bool, micro: int, padding_free: bool, one_step: dict[str, Any],
    tmp_path: Path,
):  # fmt: skip
    settings = {
        "loss": {**LOSSES[name], "sequence_level_loss": level},
        "training.effective_batch_size": 4,
        "training.per_device_train_batch_size": micro,
        "training.padding_free": padding_free,
        "sft.packing": "bfd",
    }
    config = changed(one_step, **settings)
    sft(config, tmp_path / "run")
    assert_first_step(tmp_path / "run", config, LOSSES[name], level, 4)


@pytest.mark.parametrize(("name", "micro"), [*product(LOSSES, [4, 1])])
def test_two_ranks_have_the_loss_and_the_gradient_of_the_whole_batch(
    name: str, micro: int, one_step: dict[str, Any], tmp_path: Path
):
    level = micro == 1
    settings = {
        "loss": {**LOSSES[name], "sequence_level_loss": level},
        "training.per_device_train_batch_size": micro,
    }
    config = changed(one_step, **settings)
    assert run_sft_on_ranks(config, tmp_path / "run", world_size=2) == [0, 0]
    assert_first_step(tmp_path / "run", config, LOSSES[name], level, BATCH)


@pytest.mark.parametrize("name", ["ln-plw", "irl"])
def test_packed_rows_on_two_ranks_have_the_loss_and_the_gradient_of_the_whole_batch(
    name: str, one_step: dict[str, Any], tmp_path: Path
):
    settings = {
        "loss": LOSSES[name],
        "training.effective_batch_size": 4,
        "training.per_device_train_batch_size": 1,
        "sft.packing": "bfd",
    }
    config = changed(one_step, **settings)
    assert run_sft_on_ranks(config, tmp_path / "run", world_size=2) == [0, 0]
    assert_first_step(tmp_path / "run", config, LOSSES[name], False, 4)


def test_gradient_is_clipped_to_the_norm_asked_for(one_step: dict[str, Any], tmp_path: Path):
    sft(changed(one_step, **{"training.max_grad_norm": 0.01}), tmp_path / "run")
    before = AutoModelForCausalLM.from_pretrained(one_step["model"]["path"]).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    moved = torch.stack([(before[name] - after[name]).double().norm() for name in before])
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)
    [line] = metrics(tmp_path / "run")
    assert line["grad_norm"] > 0.1  # as it was before


def test_5003_tokens_are_counted_exactly_with_bfloat16_weights():
    """In a bfloat16 tensor of weights they summed up to 4992."""
    kinds = np.full(5003, COMPLETION, np.uint8)
    weights, sums = sequence_weights(kinds, None, SftLossConfig())
    assert weights.sum() == sums.completion_weight == 5003
    assert factors(sums, SftLossConfig())[1] == 1 / 5003


def test_denominator_counts_predicted_tokens_only(one_step: dict[str, Any], tmp_path: Path):
    """A mask that isn't shifted counts the first token of each sequence, which nothing predicts."""
    config = changed(one_step, loss={"name": "sft"})
    sft(config, tmp_path / "run")
    found = list(sequences(tmp_path / "run", config["seed"], BATCH))
    predicted = sum(len(ids) - 1 for ids, _, _ in found)
    [line] = metrics(tmp_path / "run")
    assert line["num_tokens"] == predicted + BATCH
    assert line["num_trained_tokens"] == predicted


@pytest.mark.parametrize("name", ["plw", "ln-plw", "irl"])
@pytest.mark.parametrize("level", [False, True])
def test_empty_spans_contribute_nothing(name: str, level: bool):
    loss = SftLossConfig(name=name, prompt_loss_weight=0.5, sequence_level_loss=level)
    found = [
        sequence_weights(np.array(kinds, np.uint8), None, loss)
        for kinds in ([COMPLETION] * 2, [PROMPT] * 2, [EXCLUDED], [])
    ]
    of_prompt, of_completion = factors(sum((sums for _, sums in found), Sums()), loss)
    assert all(np.isfinite(weights).all() for weights, _ in found)
    assert np.isfinite([of_prompt, of_completion]).all()
    assert factors(Sums(), loss) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"name": "sft", "prompt_loss_weight": 0.1}, "sft has no prompt_loss_weight"),
        ({"name": "plw", "irl_gamma": 0.9}, "irl_gamma is a setting of irl"),
        ({"name": "plw", "prompt_loss_weight": 1.1}, "less than or equal to 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], problem: str):
    with pytest.raises(ValidationError, match=problem):
        SftLossConfig(**settings)
