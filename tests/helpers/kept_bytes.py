"""Which of a run's outputs two runs have in common."""

from typing import Any


def kept_bytes(record: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a run that are the same whenever it runs; run_files hold times and paths."""
    return {key: value for key, value in record["outputs"].items() if key != "run_files"}
