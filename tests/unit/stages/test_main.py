"""What a run says to the script that started it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from post_training.stages.__main__ import main

MAIN = """
import os, sys, types
from post_training.stages.__main__ import main
# A stage whose library ends the process.
sys.modules["post_training.stages.mix"] = types.SimpleNamespace(run=lambda *_: {end}(0))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("end", "told", "status"),
    [
        ("sys.exit", "the stage was ended by SystemExit: 0", "failed"),
        # Nothing more can be written down.
        ("os._exit", "os._exit(0) was called within the stage", "running"),
    ],
)
def test_stage_that_a_library_ends_with_exit_code_0_has_failed(
    tmp_path: Path, end: str, told: str, status: str
):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"data": {"datasets": [{"path": "rows.jsonl"}]}, "run_dir": "run"}
    (tmp_path / "mix.yaml").write_text(json.dumps({**settings, "num_processes": 1}))
    main = MAIN.format(end=end)
    command = [sys.executable, "-c", main, "mix", "mix.yaml", "--unpinned"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: {told}" in done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == status


def test_variable_by_which_a_library_would_overrule_the_configuration_is_not_used(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    settings = {"data": {"datasets": [{"path": "rows.jsonl"}]}, "run_dir": "run"}
    (tmp_path / "mix.yaml").write_text(json.dumps({**settings, "num_processes": 1}))
    main = """
import os, sys, types
from post_training.stages.__main__ import main
sys.modules["post_training.stages.mix"] = types.SimpleNamespace(
    run=lambda *_: sys.exit(os.environ.get("ACCELERATE_MIXED_PRECISION", "unset")))
sys.exit(main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", main, "mix", "mix.yaml", "--unpinned"],
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16"},
        capture_output=True,
        text=True,
    )
    assert "warning: not used: ACCELERATE_MIXED_PRECISION" in done.stderr
    assert "SystemExit: unset" in done.stderr


def test_help_config_explains_a_setting_and_those_below_it(capsys):
    assert main(["sft", "--help-config", "lora"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("lora: a mapping or null, default null [recipe]\n    Train")
    assert "lora.rank: an integer > 0, default 16 [recipe]\n" in told


def test_help_config_of_no_stage_or_key_is_told_in_one_line(capsys):
    assert main(["sfft", "--help-config"]) == 2
    assert capsys.readouterr().err.startswith("error: no stage 'sfft'\nhint: there are: ")
    assert main(["sft", "--help-config", "lorra.rank"]) == 2
    assert capsys.readouterr().err == (
        "error: no setting 'lorra.rank'\nhint: did you mean lora.rank or lora.alpha or lora?\n"
    )
