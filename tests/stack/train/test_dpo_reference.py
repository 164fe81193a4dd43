"""The reference's logprobs: stored ones are used where they are the model's, and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.dpo_runs import dpo, preference_rows
from helpers.row_files import write_rows
from helpers.sft_runs import changed, metrics
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.pairs.dataset import PairDataset
from post_training.data.rows import COMPLETION
from post_training.stages.config import PrepareConfig
from post_training.stages.context import StageContext
from post_training.stages.prepare import run


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pairs = write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preference_rows(16))
    return {
        "model": {"path": str(model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(pairs)}]},
        "dpo": {},
        "loss": {"name": "dpo", "beta": 0.1},
        "training": {"max_steps": 3, "effective_batch_size": 4, "learning_rate": 0.001},
        "logging": {"logging_steps": 1},
        "num_threads": 1,
        "seed": 7,
    }


@pytest.fixture(scope="module")
def computed(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that computed them."""
    run_dir = tmp_path_factory.mktemp("computed") / "run"
    result = dpo(config, run_dir)
    assert result.artifacts["reference"] == "reference"
    return run_dir


@pytest.fixture(scope="module")
def stored(computed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with the logprobs that run computed, and reference.json beside them."""
    folder = tmp_path_factory.mktemp("stored")
    rows = preference_rows(16)
    for row, (chosen, rejected) in zip(
        rows, np.load(computed / "reference/logprobs.npy").tolist(), strict=True
    ):
        row |= {"ref_chosen_logprob": chosen, "ref_rejected_logprob": rejected}
    write_rows(folder / "pairs.jsonl", rows)
    (folder / "reference.json").write_bytes((computed / "reference/reference.json").read_bytes())
    return folder


def with_rows(config: dict[str, Any], folder: Path, **settings: Any) -> dict[str, Any]:
    datasets = [{"path": str(folder / "pairs.jsonl")}]
    return changed(config, **{"data.datasets": datasets, **settings})


def stored_rows(stored: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stored / "pairs.jsonl").read_text().splitlines()]


def copied(stored: Path, folder: Path, **changes: str) -> Path:
    """The stored rows with another reference.json."""
    folder.mkdir()
    (folder / "pairs.jsonl").write_bytes((stored / "pairs.jsonl").read_bytes())
    record = json.loads((stored / "reference.json").read_text())
    (folder / "reference.json").write_text(json.dumps({**record, **changes}))
    return folder


def test_computed_logprobs_are_those_of_float64(computed: Path, model: Path):
    dataset = PairDataset.open(computed / "data")
    found = np.load(computed / "reference/logprobs.npy")
    wide = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for pair in dataset.read(0) + dataset.read(5):
        for side, answer in enumerate((pair.chosen, pair.rejected)):
            ids = np.concatenate([pair.prefix, answer.ids]).astype(int)
            with torch.no_grad():
                logprobs = wide(torch.tensor(ids[None])).logits[0].log_softmax(-1)
            places = [len(pair.prefix) + n for n, k in enumerate(answer.kinds) if k == COMPLETION]
            expected = sum(float(logprobs[place - 1, ids[place]]) for place in places)
            assert found[pair.number, side] == pytest.approx(expected, abs=1e-5 * len(places))


def test_stored_logprobs_train_what_computed_ones_train(
    config: dict[str, Any], computed: Path, stored: Path, tmp_path: Path
):
    result = dpo(with_rows(config, stored), tmp_path / "run")
    assert "reference" not in result.artifacts
    assert not (tmp_path / "run/reference").exists()
    assert metrics(tmp_path / "run") == metrics(computed)


def test_stored_logprobs_of_vllm_are_used_as_they_are(
    config: dict[str, Any], computed: Path, stored: Path, tmp_path: Path, capsys: Any
):
    of_vllm = copied(stored, tmp_path / "stored", backend="vllm")
    dpo(with_rows(config, of_vllm), tmp_path / "run")
    assert "were made by vllm" in capsys.readouterr().err
    assert metrics(tmp_path / "run") == metrics(computed)


@pytest.mark.parametrize("name", ["weights", "tokenizer", "chat_template"])
def test_stored_logprobs_of_another_model_stop_the_run(
    name: str, config: dict[str, Any], stored: Path, tmp_path: Path
):
    other = copied(stored, tmp_path / "other", **{name: "0" * 64})
    with pytest.raises(PostTrainingError, match=f"are of another model: {name}"):
        dpo(with_rows(config, other), tmp_path / "run")


def test_stored_logprobs_that_the_untouched_model_does_not_give_stop_the_run(
    config: dict[str, Any], stored: Path, tmp_path: Path
):
    rows = stored_rows(stored)
    for row in rows:
        row["ref_rejected_logprob"] -= 0.5
    other = copied(stored, tmp_path / "other")
    write_rows(other / "pairs.jsonl", rows)
    with pytest.raises(PostTrainingError, match="not those of the untouched model: they differ"):
        dpo(with_rows(config, other), tmp_path / "run")
    assert not (tmp_path / "run/metrics.jsonl").read_text()
    dpo(with_rows(config, other, **{"reference.tolerance": 1.0}), tmp_path / "tolerant")
    dpo(with_rows(config, other, **{"reference.logprobs": "computed"}), tmp_path / "computed")


def test_stored_logprobs_without_a_reference_are_used_only_when_asked_for(
    config: dict[str, Any], stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = copied(stored, tmp_path / "other")
    (other / "reference.json").unlink()
    with pytest.raises(UsageError, match=r"no reference\.json says which model made"):
        dpo(with_rows(config, other), tmp_path / "run")
    dpo(with_rows(config, other, **{"reference.logprobs": "stored"}), tmp_path / "asked")
    assert "only the first step checks them" in capsys.readouterr().err


def test_stored_logprobs_of_some_pairs_alone_are_refused(
    config: dict[str, Any], stored: Path, tmp_path: Path
):
    rows = stored_rows(stored)
    del rows[3]["ref_chosen_logprob"]
    other = copied(stored, tmp_path / "other")
    write_rows(other / "pairs.jsonl", rows)
    with pytest.raises(UsageError, match=r"15 of 16 pairs in .*data have reference logprobs"):
        dpo(with_rows(config, other), tmp_path / "run")


def test_stored_logprobs_of_an_answer_that_is_cut_are_not_used(
    config: dict[str, Any], stored: Path, tmp_path: Path
):
    settings = {"dpo.max_completion_length": 8, "dpo.truncated_completions": "train"}
    with pytest.raises(UsageError, match="reference logprobs of the tokens that are"):
        dpo(with_rows(config, stored, **settings), tmp_path / "run")


def test_reference_model_that_is_named_is_what_the_ratios_are_to(
    config: dict[str, Any], init_model: Any, tmp_path: Path
):
    other = init_model(tmp_path / "init", seed=5)
    named = changed(config, **{"reference.ref_model_name_or_path": str(other)})
    dpo(named, tmp_path / "run")
    [first, *_] = metrics(tmp_path / "run")
    assert abs(first["kl"]) > 1e-3
    weights = [
        AutoModelForCausalLM.from_pretrained(path) for path in (other, config["model"]["path"])
    ]
    one, two = (next(model.parameters()) for model in weights)
    assert not torch.equal(one, two)


def test_qrpo_without_quantiles_is_refused(config: dict[str, Any], tmp_path: Path):
    rows = preference_rows(6)
    for row in rows[2:]:
        del row["ref_rewards"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    settings = {"loss": {"name": "qrpo", "beta": 0.1}}
    with pytest.raises(PostTrainingError, match="4 of 6 pairs lack a quantile reward"):
        dpo(with_rows(config, tmp_path, **settings), tmp_path / "run")


def test_pairs_prepared_beforehand_train_what_the_run_itself_prepares(
    config: dict[str, Any], computed: Path, model: Path, tmp_path: Path
):
    (tmp_path / "prepare").mkdir()
    settings = {name: config[name] for name in ("data", "dpo", "seed")}
    prepared = PrepareConfig.model_validate({**settings, "tokenizer": str(model)})
    inputs = {"data.datasets[0].path": "a"}
    run(prepared, StageContext(tmp_path / "prepare", input_fingerprints=inputs))
    from_folder = changed(config, data={"prepared": str(tmp_path / "prepare/dataset")})
    dpo(from_folder, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(computed)
    with pytest.raises(UsageError, match=r"other settings: dpo\.share_prompt"):
        dpo(changed(from_folder, **{"dpo.share_prompt": True}), tmp_path / "other")
