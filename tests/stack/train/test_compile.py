"""torch.compile on a CPU: the same training to the rounding, and the same bits after a kill."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, stable_files
from helpers.stage_process import run_sft_on_ranks

pytestmark = [
    pytest.mark.long,  # more than a minute of compiling
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, as the setting does"),
]


def test_compiled_run_killed_and_resumed_ends_in_the_same_bytes(
    config: dict[str, Any], init_model: Any, tmp_path: Path
):
    # As little to compile as there can be.
    small = init_model(tmp_path / "small", num_hidden_layers=1)
    settings = {
        "training.torch_compile": True,
        "training.max_steps": 6,
        "checkpointing.save_steps": 2,
        "model.path": str(small),
        "sft.packing": "bfd",
    }
    compiled = changed(config, **settings)
    assert run_sft_on_ranks(compiled, tmp_path / "whole") == [0]
    point = "before the random state is saved"
    assert run_sft_on_ranks(compiled, tmp_path / "killed", kill_at=point) == [-9]
    assert run_sft_on_ranks(compiled, tmp_path / "killed", resuming=True) == [0]
    assert stable_files(tmp_path / "killed") == stable_files(tmp_path / "whole")
    plain = changed(compiled, **{"training.torch_compile": False})
    assert run_sft_on_ranks(plain, tmp_path / "plain") == [0]
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "plain"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    whole, plain_files = stable_files(tmp_path / "whole"), stable_files(tmp_path / "plain")
    name = "model/model.safetensors"
    assert whole.keys() == plain_files.keys()
    assert whole[name] != plain_files[name]  # else nothing was compiled
