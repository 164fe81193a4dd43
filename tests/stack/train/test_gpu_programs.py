"""The programs for a machine with a GPU still call our code as it is: step a's losses, on a CPU.
tests/gpu runs all of them."""

import json
from pathlib import Path

import pytest

GPU = Path(__file__).parents[3] / "reproducibility/benchmarks/gpu"


def test_step_a_finds_the_losses_of_packed_and_padded_rows_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.syspath_prepend(GPU)
    import check_training
    from step import PREFIX, Step

    check_training._check_losses(Step("cpu", True, tmp_path), "tiny", (5, 40, 19))
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line.removeprefix(PREFIX)) for line in lines if line.startswith(PREFIX)]
    assert len(found) == 5
    assert all(each["good"] for each in found), found
