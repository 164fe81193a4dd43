"""A model spread over two ranks gives the figures of a whole one, and the rejects."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.branch_rows import branch, data, prompt_row
from helpers.row_files import read_rows, write_rows
from helpers.stage_process import start_entrypoint


@pytest.fixture
def entrypoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(exit code, what it said) of `entrypoint STAGE` with these settings."""
    monkeypatch.chdir(tmp_path)

    def run(stage: str, settings: dict[str, Any], run_dir: str) -> tuple[int, str]:
        config = tmp_path / f"{run_dir}.yaml"
        config.write_text(json.dumps({**settings, "run_dir": run_dir, "num_threads": 1}))
        log = tmp_path / f"{run_dir}.log"
        process = start_entrypoint([stage, str(config), "--unpinned"], log)
        process.join(timeout=120)
        return process.exitcode, log.read_text()

    return run


def settings_of(model: Path, path: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "data": data(path, chat_template="chatml", on_error="quarantine"),
        "chunk_rows": 2,
    }


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.long), True], ids=["untied", "tied"])
def either_model(request, model: Path, init_model, tmp_path: Path) -> Path:
    """Tied: the output layer is the embedding."""
    return init_model(tmp_path / "tied", tie_word_embeddings=True) if request.param else model


def test_logprobs_of_two_ranks_in_step_are_those_of_one(either_model, entrypoint, tmp_path: Path):
    rows = [
        prompt_row(f"p{n}", f"What is {n} + 1?", [branch(f"{value}." * n) for value in range(1, 4)])
        for n in range(1, 5)
    ]
    # An id beyond the vocabulary is an error in the midst of the model, on both ranks.
    rows[1:1] = [prompt_row("poison", "What?", [branch("x", completion_token_ids=[10**6])])]
    settings = settings_of(either_model, write_rows(tmp_path / "rows.jsonl", rows))
    settings["max_failed_rows"] = 1
    in_step = {"tensor_parallel_size": 2, "num_processes": 2}
    for run_dir, more in (("whole", {}), ("spread", in_step), ("again", in_step)):
        code, said = entrypoint("logprobs", settings | more, run_dir)
        assert code == 0, said
    whole, spread = read_rows(tmp_path / "whole"), read_rows(tmp_path / "spread")
    assert read_rows(tmp_path / "again") == spread
    assert [row["conversation_id"] for row in spread] == ["p1", "p2", "p3", "p4"]
    for one, other in zip(whole, spread, strict=True):
        pairs = zip(one["conversation_branches"], other["conversation_branches"], strict=True)
        for a, b in pairs:
            assert a["completion_length"] == b["completion_length"]
            close = pytest.approx(b["completion_ref_logprob"], abs=1e-5 * a["completion_length"])
            assert a["completion_ref_logprob"] == close
    rejects = [
        json.loads((tmp_path / name / "rejects.jsonl").read_text()) for name in ("whole", "spread")
    ]
    assert rejects[0]["problem"] == "poison: IndexError: index out of range in self"
    assert rejects[1]["problem"] == rejects[0]["problem"]
    record = json.loads((tmp_path / "spread/run.json").read_text())
    assert record["topology"]["tensor_parallel_size"] == 2


def test_logprobs_in_step_that_fail_say_why_and_no_rank_has_a_traceback(
    model, entrypoint, tmp_path: Path
):
    rows = [prompt_row("poison", "What?", [branch("x", completion_token_ids=[10**6])])]
    settings = settings_of(model, write_rows(tmp_path / "rows.jsonl", rows))
    settings |= {"tensor_parallel_size": 2, "num_processes": 2}
    settings["data"]["on_error"] = "fail"
    code, said = entrypoint("logprobs", settings, "run")
    assert code == 1
    assert "failed at row poison: IndexError: index out of range in self" in said
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    assert "Traceback" not in said


def test_tensor_parallel_size_that_is_not_the_number_of_processes_is_refused(
    model, entrypoint, tmp_path: Path
):
    path = write_rows(tmp_path / "rows.jsonl", [prompt_row("p", "What?", [branch("x")])])
    settings = {**settings_of(model, path), "tensor_parallel_size": 2}
    code, said = entrypoint("logprobs", settings, "run")
    assert code == 2
    assert "tensor_parallel_size is 2, and the run has 1 processes: must be equal" in said
