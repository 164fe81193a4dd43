"""vLLM draws on CPUs too: the same samples in any chunks, with the model's own logprobs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.row_files import read_rows
from helpers.vllm_runs import run_with_vllm
from post_training.annotate.config import VllmConfig
from post_training.annotate.engine import refuse_batch_invariant_on_rocm
from post_training.core.errors import UsageError
from post_training.models.load import load_tokenizer

POISONED = "poison in self.endings._decode(prompt.ids)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def generate(model_of_32: Path, dataset: Path, folder: Path) -> Callable[..., None]:
    """generate((name of the run folder, other settings, word of a prompt that kills), …)"""
    data = folder / "prompts.jsonl"
    data.write_text("".join(dataset.read_text().splitlines(keepends=True)[:5]))
    sources = {"chat_template": "chatml", "datasets": [{"path": str(data)}]}
    config = {
        "model": {"path": str(model_of_32)},
        "data": {**sources, "on_error": "quarantine"},
        "sampling": {"n": 3, "max_tokens": 10},
        "backend": "vllm",
        "num_threads": 1,
        "chunk_rows": 100,
    }

    def run(*runs: tuple[str, dict[str, Any], str | None]) -> None:
        placed = [(folder / name, *rest) for name, *rest in runs]
        run_with_vllm("generate", "samplers.VllmSampler.sample", POISONED, config, placed)

    return run


@pytest.fixture(scope="module")
def long_model(init_model: Callable[..., Path], folder: Path) -> Path:
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return init_model(folder / "long", **shape, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def runs(generate: Callable[..., None], long_model: Path, folder: Path) -> Path:
    """The same samples, cut into chunks in two ways; and 10 samples of a prompt of 900 tokens. In
    one process, since importing vLLM takes longer than any of the runs."""
    data = folder / "long.jsonl"
    data.write_text(json.dumps({"question": "?" * 860, "answer": "!"}) + "\n")
    long_prompt = {
        "model": {"path": str(long_model)},
        "data": {"chat_template": "chatml", "datasets": [{"path": str(data)}]},
        "sampling": {"n": 10, "max_tokens": 3},
    }
    generate(
        ("one chunk", {}, None),
        ("chunks of 2", {"chunk_rows": 2}, None),
        ("long prompt", long_prompt, None),
    )
    return folder


def bytes_of(run_dir: Path) -> bytes:
    return (run_dir / "dataset/rows.jsonl").read_bytes()


def test_vllm_samples_have_the_same_bytes_for_any_chunks(runs):
    assert bytes_of(runs / "one chunk") == bytes_of(runs / "chunks of 2")
    for row in read_rows(runs / "one chunk"):
        drawn = row["conversation_branches"][1:]
        assert len({tuple(sample["completion_token_ids"]) for sample in drawn}) == 3


def test_vllm_logprobs_of_its_samples_are_those_of_transformers(runs, model_of_32):
    tokenizer = load_tokenizer(model_of_32)
    reference = AutoModelForCausalLM.from_pretrained(model_of_32, dtype=torch.float64)
    for row in read_rows(runs / "one chunk"):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["initial_prompt"]["content"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for sample in row["conversation_branches"][1:]:
            ids = sample["completion_token_ids"]
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1)[range(len(ids)), ids].tolist()
            assert sample["completion_token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
            text = tokenizer.decode(ids, skip_special_tokens=True)
            assert sample["messages"][0]["parts"][0]["content"] == text


def test_vllm_samples_a_prompt_whose_samples_are_longer_than_one_step(runs, long_model):
    """10 × 900 tokens: vLLM cuts a prefill at 4,096, and rewinds a generator at the cut, which
    those on CPUs can't do."""
    [found] = read_rows(runs / "long prompt")
    assert 10 * found["prompt_length"] > 2 * 4096
    drawn = found["conversation_branches"][1:]
    assert len({tuple(sample["completion_token_ids"]) for sample in drawn}) > 5
    reference = AutoModelForCausalLM.from_pretrained(long_model, dtype=torch.float64)
    for sample in drawn[::4]:
        ids = sample["completion_token_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([found["prompt_token_ids"] + ids])).logits[0]
        logprobs = logits[-len(ids) - 1 : -1].log_softmax(-1)[range(len(ids)), ids].tolist()
        assert sample["completion_token_logprobs"] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.long
def test_vllm_engine_that_died_is_restarted_and_the_row_that_did_it_named(runs, generate):
    # Three restarts in all, and two of them one after another.
    config = {"vllm": {"max_restarts": 2}, "max_failed_rows": 1}
    generate(("poisoned", config, "3 + 9"))
    [reject] = (runs / "poisoned/rejects.jsonl").read_text().splitlines()
    assert "RuntimeError: the engine died" in json.loads(reject)["problem"]
    healthy = read_rows(runs / "one chunk")
    assert read_rows(runs / "poisoned") == [row for n, row in enumerate(healthy) if n != 2]


@pytest.mark.parametrize(("rocm", "is_refused"), [("7.0.51831", True), (None, False)])
def test_vllm_batch_invariant_is_refused_on_rocm_alone(rocm, is_refused, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", rocm)
    refuse_batch_invariant_on_rocm(VllmConfig(batch_invariant=False))
    if not is_refused:
        refuse_batch_invariant_on_rocm(VllmConfig())
        return
    with pytest.raises(UsageError, match=r"vllm.batch_invariant: not known to hold on ROCm\nhint"):
        refuse_batch_invariant_on_rocm(VllmConfig())
