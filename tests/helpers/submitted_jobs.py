"""Submitted stages on a test cluster: submit, watch, wait."""

import os
import re
import subprocess
from pathlib import Path

from helpers.slurm_cluster import TIMEOUT_S, wait_until
from post_training.records.run_record import read_record


class SubmittedJobs:
    """folder: where commands run, with sft.yaml and the EDF `submitted.toml` in it."""

    def __init__(self, slurm_conf: Path, cli: Path, folder: Path):
        self.folder = folder
        self._cli = cli
        self.environment = {**os.environ, "SLURM_CONF": str(slurm_conf)}

    def run(self, *argv: str | Path, check: bool = True) -> str:
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        self.stderr = done.stderr
        return done.stdout

    def post_training(self, *words: str | Path, check: bool = True) -> str:
        return self.run(self._cli, *words, check=check)

    def submit(self, *words: str, stage: str = "sft", config: str = "sft.yaml") -> str:
        command = ("submit", stage, config, "--environment=submitted.toml", *words)
        return self.post_training(*command).strip()

    def shown(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "show", "job", job_id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job_id: str) -> str:
        return self.shown(job_id)["JobState"]

    def wait(self, job_id: str | None = None) -> str | None:
        """Until nothing is in the queue; the job's last state."""
        queue = ("squeue", "--noheader", "--format=%A")
        wait_until(lambda: self.run(*queue).split() == [])
        return self.state(job_id) if job_id else None

    def wait_for_steps(self, run_dir: str) -> None:
        """Until the training's first line is there."""
        metrics = self.folder / run_dir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text() != "")

    def log(self, run_dir: str, job_id: str) -> str:
        return (self.folder / run_dir / f"slurm/slurm-{job_id}.out").read_text()

    def attempts(self, run_dir: str) -> list[tuple[str, str | None]]:
        record = read_record(self.folder / run_dir)
        return [(attempt["status"], attempt["reason"]) for attempt in record["attempts"]]
