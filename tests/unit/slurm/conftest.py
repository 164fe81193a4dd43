"""The command line in a folder with an EDF, with stand-ins for Slurm's programs."""

import os
from pathlib import Path

import pytest

from helpers.slurm_programs import write_programs


@pytest.fixture
def slurm_command(post_training, tmp_path):
    """Run `post-training WORDS`; queue: what squeue prints."""
    programs = write_programs(tmp_path)

    def run(*words: str | Path, queue: str = "", **variables: str):
        (programs / "queue").write_text(queue)
        return post_training(
            *words,
            PATH=f"{programs}:{os.environ['PATH']}",
            XDG_CACHE_HOME=str(tmp_path / "cache"),
            **variables,
        )

    return run
