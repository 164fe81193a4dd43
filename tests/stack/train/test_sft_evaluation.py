"""Evaluation against float64 sums over the rows, and that training does not notice it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from helpers.sft_runs import changed, metrics, sft, stable_files
from helpers.stage_process import run_sft_on_ranks
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION, PROMPT
from post_training.train.config import SftConfig


def evaluated(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """With an evaluation in each fifth step; its last batch is smaller than the others."""
    evaluation = {"datasets": config["data"]["datasets"], "debug_subsample": 14, "eval_steps": 5}
    evaluation = {**evaluation, "per_device_eval_batch_size": 4, **settings}
    return changed(
        config, evaluation=evaluation, loss={"name": "ln-plw", "prompt_loss_weight": 0.3}
    )


def evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["eval"] for line in metrics(run_dir) if "eval" in line}


def expected(run_dir: Path, w: float, *, by_sequence: bool = False) -> dict[str, float]:
    """Of the final model, in float64, one row after another; w: prompt_loss_weight. by_sequence:
    the loss is the mean of the sequences' own."""
    rows = PreparedDataset.open(run_dir / "evaluation")
    assert len(rows) == 14
    model = AutoModelForCausalLM.from_pretrained(
        run_dir / "model", dtype=torch.float64, attn_implementation="eager"
    ).eval()
    losses: dict[int, list[float]] = {PROMPT: [], COMPLETION: []}
    hits: dict[int, list[bool]] = {PROMPT: [], COMPLETION: []}
    of_sequences = []

    def mean(values: list) -> float:
        return sum(values) / len(values)

    with torch.no_grad():
        for index in range(len(rows)):
            row = rows.read(index)
            first = {kind: len(values) for kind, values in losses.items()}
            logprobs_TV = model(torch.tensor(row.ids[None].astype(int))).logits[0].log_softmax(-1)
            for position in range(1, len(row.ids)):
                target, kind = int(row.ids[position]), int(row.kinds[position])
                losses[kind].append(-float(logprobs_TV[position - 1, target]))
                hits[kind].append(int(logprobs_TV[position - 1].argmax()) == target)
            own = {kind: mean(values[first[kind] :]) for kind, values in losses.items()}
            of_sequences.append(w * own[PROMPT] + own[COMPLETION])
    loss = w * mean(losses[PROMPT]) + mean(losses[COMPLETION])
    return {
        "loss": mean(of_sequences) if by_sequence else loss,
        "prompt_loss": mean(losses[PROMPT]),
        "completion_loss": mean(losses[COMPLETION]),
        "prompt_accuracy": mean(hits[PROMPT]),
        "completion_accuracy": mean(hits[COMPLETION]),
    }


def figures(run_dir: Path, **loss: Any) -> dict[str, float]:
    """Of the final model, in this process, with further settings of the loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from post_training.data.prepared.dataset import PreparedDataset
    from post_training.models.head import ChunkedHead
    from post_training.stages.context import Ranks
    from post_training.train.config import SftLossConfig
    from post_training.train.sft import SftEvaluation
    from post_training.train.sft_loss import SftCollator

    settings = SftLossConfig(name="ln-plw", prompt_loss_weight=0.3, **loss)
    rows = PreparedDataset.open(run_dir / "evaluation")
    collator = SftCollator(rows, settings, pad_token_id=0, packed=False)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
    evaluation = SftEvaluation(collator, 4, None, Ranks(), ChunkedHead.install(model))
    sums = evaluation.sums(model, torch.device("cpu"))
    return evaluation.figures(sums)


def test_evaluation_has_the_figures_of_the_rows_one_by_one(config: dict[str, Any], tmp_path: Path):
    result = sft(evaluated(config), tmp_path / "run")
    found = evaluations(tmp_path / "run")
    assert list(found) == [5, 10, 12]
    assert found[12] == pytest.approx(expected(tmp_path / "run", 0.3), rel=1e-5)
    assert found[12]["completion_loss"] < found[5]["completion_loss"]
    assert result.metrics["eval_loss"] == found[12]["loss"]
    assert figures(tmp_path / "run", sequence_level_loss=True) == pytest.approx(
        expected(tmp_path / "run", 0.3, by_sequence=True), rel=1e-5
    )


def test_evaluation_on_two_ranks_has_the_same_figures(config: dict[str, Any], tmp_path: Path):
    # 14 rows in batches of 4: the second rank has one batch fewer that counts.
    assert run_sft_on_ranks(evaluated(config), tmp_path / "run", world_size=2) == [0, 0]
    found = evaluations(tmp_path / "run")
    assert found[12] == pytest.approx(expected(tmp_path / "run", 0.3), rel=1e-5)


def test_evaluation_changes_no_bit_of_the_training(config: dict[str, Any], tmp_path: Path):
    with_it = evaluated(config)
    without = {key: value for key, value in with_it.items() if key != "evaluation"}
    sft(with_it, tmp_path / "with")
    sft(without, tmp_path / "without")
    found = {
        name: digest
        for name, digest in stable_files(tmp_path / "with").items()
        if not name.startswith("evaluation")
    }
    assert found == stable_files(tmp_path / "without")


def test_evaluation_on_prepared_rows_needs_no_template(config: dict[str, Any], tmp_path: Path):
    sft(evaluated(config), tmp_path / "first")
    settings = {"evaluation": {"prepared": str(tmp_path / "first" / "evaluation")}}
    sft(changed(evaluated(config), **settings), tmp_path / "second")
    assert evaluations(tmp_path / "second") == {12: evaluations(tmp_path / "first")[12]}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"datasets": []}, "set exactly one of datasets, prepared"),
        ({"prepared": "somewhere"}, "set exactly one of datasets, prepared"),
    ],
)
def test_evaluation_needs_one_kind_of_source(
    settings: dict[str, Any], problem: str, config: dict[str, Any]
):
    with pytest.raises(ValidationError, match=problem):
        SftConfig.model_validate(evaluated(config, **settings))
