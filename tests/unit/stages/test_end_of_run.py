"""What a finished run leaves and says: its page, which no record lists, and the next steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.records.check import check_run
from post_training.stages.context import Result
from post_training.stages.execute import _next_steps
from post_training.stages.registry import find_stage


def test_finished_run_leaves_a_page_that_is_in_no_record_and_says_what_is_next(tmp_path: Path):
    config = {
        "command": ["sh", "-c", "mkdir out && echo hi > out/file && echo ho > log"],
        "outputs": [{"name": "result", "path": "out"}, {"name": "notes", "path": "log"}],
        "run_dir": "run",
        "num_processes": 1,
    }
    (tmp_path / "cfg.yaml").write_text(json.dumps(config))
    words = ["-m", "post_training.stages", "exec", "cfg.yaml", "--unpinned"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    # Unpinned, it could not be run again: `reproduce` is not named.
    assert done.stderr.endswith(
        "finished: run\nnext: look at run/report.html\nmade: run/result; run/notes\n"
    )
    assert 'content="post-training report"' in (tmp_path / "run/report.html").read_text()
    assert "report.html" not in (tmp_path / "run/run.json").read_text()
    assert check_run(tmp_path / "run").faults == []


@pytest.mark.parametrize(
    ("kind", "last"),
    [
        ("model", "made: run/model, for sft or generate, as model.path"),
        ("checkpoint", "made: run/checkpoint"),  # for Megatron-LM, and for no stage of ours
    ],
)
def test_conversion_says_which_stage_takes_what_it_made(kind: str, last: str):
    result = Result(artifacts={kind: kind}, metrics={})
    *_, line = _next_steps(find_stage("convert"), Path("run"), result, None, False)
    assert line == last
