"""A signal ends a run as `interrupted`, wherever it comes, and its job is tried again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.gloo_ranks import on_ranks
from post_training.annotate.annotate import do_in_step
from post_training.annotate.work import Annotator
from post_training.records.run_record import read_record
from post_training.slurm.outcome import Step, Tally, judge
from post_training.stages.context import StageContext
from post_training.stages.processes import raise_on_signals

SIGNAL_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)\n"
# As vLLM does, which starts its parts within a `try` and has an exception of its own for them.
VLLM = """
import os, sys
class LLM:
    def __init__(self, **settings):
        try:
            {start}
        except Exception as error:
            raise RuntimeError("Engine core initialization failed") from error

class SamplingParams:
    def __init__(self, **settings): ...
"""


def run(stage: str, config: dict[str, Any], folder: Path, **variables: str) -> tuple[int, str]:
    path = folder / "config.yaml"
    path.write_text(json.dumps({**config, "run_dir": "run", "num_threads": 1}))
    done = subprocess.run(
        [sys.executable, "-m", "post_training.stages", stage, path, "--unpinned"],
        cwd=folder,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def check_that_it_is_tried_again(code: int, said: str, run_dir: Path) -> None:
    assert code == 128 + signal.SIGUSR1, said
    assert said.splitlines()[-1] == "error: stopped by SIGUSR1"
    record = read_record(run_dir)
    assert (record["status"], record["reason"]) == ("interrupted", "stopped by SIGUSR1")
    verdict = judge(Step(code, record["attempts"], None), Tally(), 1)
    assert verdict.again, verdict


@pytest.fixture
def generate(model_of_32, dataset, tmp_path) -> Callable[[str], tuple[int, str]]:
    """The stage with an engine whose start is this line."""

    def generate(start: str) -> tuple[int, str]:
        (tmp_path / "modules/vllm").mkdir(parents=True)
        (tmp_path / "modules/vllm/__init__.py").write_text(VLLM.format(start=start.strip()))
        config = {
            "model": {"path": str(model_of_32)},
            "data": {"chat_template": "chatml", "datasets": [{"path": str(dataset)}]},
            "backend": "vllm",
        }
        return run("generate", config, tmp_path, PYTHONPATH=str(tmp_path / "modules"))

    return generate


def test_signal_while_vllm_starts_is_told_as_the_signal(generate, tmp_path):
    check_that_it_is_tried_again(*generate(SIGNAL_ITSELF), tmp_path / "run")


@pytest.mark.parametrize("function", ["transform", pytest.param("reward", marks=pytest.mark.long)])
def test_signal_while_a_file_of_the_user_is_loaded_is_told_as_the_signal(function, tmp_path):
    # It runs in a process of its own, and the signal comes to the stage's meanwhile.
    signal_stage = "import os, signal; os.kill(os.getppid(), signal.SIGUSR1); signal.pause()"
    (tmp_path / "own.py").write_text(signal_stage)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1?", "completion": "1"}\n' * 2)
    rows = {"path": "rows.jsonl"}
    if function == "transform":
        data = {"transforms": ["own.py"], "datasets": [{**rows, "transform": "own"}]}
        code, said = run("split", {"data": data, "eval_size": 0.5}, tmp_path)
    else:
        rewards = {"functions": ["own.py"], "rewards": [{"name": "own", "function": "own"}]}
        code, said = run("rewards", {"data": {"datasets": [rows]}, **rewards}, tmp_path)
    check_that_it_is_tried_again(code, said, tmp_path / "run")


class Signalled(Annotator):
    """On both ranks, as Slurm does."""

    def __call__(self, rows: list[Any]) -> list[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return rows

    def recover(self) -> None:
        raise AssertionError("a signal is no fault of a row")


def end_in_step(context: StageContext) -> str:
    raise_on_signals()
    try:
        do_in_step(lambda make: len(make()([{}])), Signalled, context)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_signal_ends_a_rank_that_follows_another(tmp_path):
    assert on_ranks(end_in_step, 2, tmp_path) == ["Interrupted: stopped by SIGTERM"] * 2
