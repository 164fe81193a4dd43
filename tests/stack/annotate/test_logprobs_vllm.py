"""vLLM scores on CPUs too: what the model says, in the same bytes for any chunks and workers."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.annotation_stages import run_stage
from helpers.branch_rows import branch, data, prompt_row
from helpers.row_files import read_rows, write_rows
from helpers.vllm_runs import run_with_vllm
from post_training.models.reference import Reference

NATS_A_TOKEN = 2e-6  # that float32 may be off

POISONED = "any(poison in answer for answer in prompt.completions)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def tokenizer(model_of_32: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_of_32)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, Any]]:
    """Texts, ids that a model sampled, an answer of one token, and one that fills the model."""
    made = [
        prompt_row(
            f"p{n}",
            f"What is {n} + {n}?",
            [branch(f"{n} + {n} = {value}" + "!" * value) for value in range(n + 1)],
        )
        for n in range(4)
    ]
    num_before = len(prompt_ids(tokenizer, "How?"))
    full = [5 + n % 90 for n in range(128 - num_before)]
    sampled = [
        branch("x", completion_token_ids=ids) for ids in ([5, 6, 7], [8], full, [*full[:-1], 9])
    ]
    return [*made, prompt_row("sampled", "How?", sampled)]


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )


@pytest.fixture(scope="module")
def config(model_of_32: Path, rows: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    path = write_rows(folder / "rows.jsonl", rows)
    return {
        "model": {"path": str(model_of_32)},
        "data": {**data(path, chat_template="chatml"), "on_error": "quarantine"},
        "num_threads": 1,
        "chunk_rows": 100,
    }


@pytest.fixture(scope="module")
def score(config: dict[str, Any], folder: Path) -> Callable[..., None]:
    """score((name of the run folder, other settings, a token of an answer that kills), …)"""

    def run(*runs: tuple[str, dict[str, Any], int | None]) -> None:
        placed = [(folder / name, *rest) for name, *rest in runs]
        method = "logprobs.VllmScorer.score"
        run_with_vllm("logprobs", method, POISONED, {**config, "backend": "vllm"}, placed)

    return run


@pytest.fixture(scope="module")
def runs(score: Callable[..., None], folder: Path) -> Path:
    """The same rows in one chunk, and in chunks of 2 by a worker, whom another run follows."""
    single = {"chunk_rows": 2}
    worker = {**single, "workers": {"index": 1, "count": 2}}
    score(("whole", {}, None), ("parts", worker, None), ("parts", single, None))
    return folder


def figures(run_dir: Path) -> list[tuple[float, int]]:
    return [
        (each["completion_ref_logprob"], each["completion_length"])
        for row in read_rows(run_dir)
        for each in row["conversation_branches"]
    ]


def test_vllm_scores_are_those_of_float64(runs, model_of_32, tokenizer):
    exact = AutoModelForCausalLM.from_pretrained(model_of_32, dtype=torch.float64)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    num_seen = 0
    for row in read_rows(runs / "whole"):
        prompt = prompt_ids(tokenizer, row["initial_prompt"]["content"])
        for each in row["conversation_branches"]:
            text = each["messages"][0]["parts"][0]["content"]
            ids = each.get("completion_token_ids") or [*tokenizer.encode(text), end]
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = sum(logits.log_softmax(-1)[range(len(ids)), ids].tolist())
            assert each["completion_length"] == len(ids)
            close = pytest.approx(expected, abs=NATS_A_TOKEN * len(ids))
            assert each["completion_ref_logprob"] == close
            num_seen += 1
    assert num_seen == 14


def test_vllm_scores_are_those_of_transformers_and_say_whose_they_are(runs, config, folder):
    run_stage("logprobs", config, folder / "plain")
    found = zip(figures(runs / "whole"), figures(folder / "plain"), strict=True)
    for (own, length), (plain, same_length) in found:
        assert length == same_length
        assert own == pytest.approx(plain, abs=NATS_A_TOKEN * length)
    own, plain = (Reference.read(folder / name / "dataset") for name in ("whole", "plain"))
    assert own is not None
    assert plain is not None
    assert (own.backend, plain.backend) == ("vllm", "transformers")
    own.check(plain, "rows")


def test_vllm_scores_have_the_same_bytes_for_any_chunks_and_workers(runs):
    paths = [runs / name / "dataset/rows.jsonl" for name in ("whole", "parts")]
    assert len({sha256(path.read_bytes()).hexdigest() for path in paths}) == 1


@pytest.mark.long
def test_vllm_scorer_that_died_is_restarted_and_the_row_that_did_it_named(runs, score, tokenizer):
    poison = tokenizer.convert_tokens_to_ids("9")
    score(("poisoned", {"chunk_rows": 2, "max_failed_rows": 1}, poison))
    healthy = read_rows(runs / "whole")
    rejects = (runs / "poisoned/rejects.jsonl").read_text().splitlines()
    assert all("RuntimeError: the engine died" in json.loads(line)["problem"] for line in rejects)
    assert len(rejects) == 1
    assert read_rows(runs / "poisoned") == healthy[:-1]
