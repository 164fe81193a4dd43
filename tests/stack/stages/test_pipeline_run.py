"""`post-training pipeline run` on this machine: each stage once, and again only what changed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.slurm_cluster import TIMEOUT_S, wait_until
from post_training.records.run_record import read_record

PIPELINE = """
run_dir: runs
stages:
  parts:
    stage: split
    config: {data: {datasets: [{path: rows.jsonl}]}, eval_size: 2}
  mixed:
    stage: mix
    config:
      data: {datasets: [{path: "${stages.parts.dataset}/train.jsonl", duplication_factor: 2}]}
"""


class Pipeline:
    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "pipeline.yaml").write_text(PIPELINE)
        rows = [{"prompt": f"{number}?", "completion": f"{number}"} for number in range(20)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *words: str, verb: str = "run") -> subprocess.Popen[str]:
        unpinned = ["--unpinned"] if verb == "run" else []
        return subprocess.Popen(
            [sys.executable, "-m", "post_training.cli", "pipeline", verb, "pipeline.yaml",
             *unpinned, *words],
            cwd=self.folder, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, *words: str, verb: str = "run") -> subprocess.CompletedProcess[str]:
        process = self.start(*words, verb=verb)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def run_dirs(self, name: str) -> list[Path]:
        return sorted((self.folder / "runs").glob(f"{name}-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Pipeline:
    pipeline = Pipeline(tmp_path_factory.mktemp("pipeline"))
    done = pipeline.run()
    assert done.returncode == 0, done.stderr
    return pipeline


def test_pipeline_hands_the_artifact_of_one_stage_to_the_next(finished):
    (parts,), (mixed,) = finished.run_dirs("parts"), finished.run_dirs("mixed")
    rows = (parts / "dataset/train.jsonl").read_text().splitlines()
    assert sorted((mixed / "dataset/rows.jsonl").read_text().splitlines()) == sorted(rows * 2)
    made = json.loads((parts / "dataset/artifact.json").read_text())
    assert (
        read_record(mixed)["inputs"]["data.datasets[0].path"]["fingerprint"]
        == (made["files"]["train.jsonl"])
    )


def test_pipeline_hands_what_a_command_made_to_the_next_one(tmp_path):
    (tmp_path / "rows").write_text("a\n")
    (tmp_path / "pipeline.yaml").write_text("""\
run_dir: runs
stages:
  first:
    stage: exec
    config:
      command: [sh, -c, "cat rows rows > twice"]
      inputs: [{name: rows, path: rows}]
      outputs: [{name: made, path: twice}]
  second:
    stage: exec
    config:
      command: [sh, -c, "cat made/twice > out"]
      inputs: [{name: made, path: "${stages.first.made}"}]
      outputs: [{name: kept, path: out}]
""")
    done = subprocess.run(
        [sys.executable, "-m", "post_training.cli", "pipeline", "run", "pipeline.yaml",
         "--unpinned"], cwd=tmp_path, env=os.environ, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (first,) = (tmp_path / "runs").glob("first-*")
    (second,) = (tmp_path / "runs").glob("second-*")
    assert (second / "kept/out").read_text() == "a\na\n"
    made = read_record(first)["outputs"]["artifacts"]["made"]["fingerprint"]
    assert read_record(second)["inputs"]["inputs[0].path"]["fingerprint"] == made


def test_pipeline_again_tells_a_topology_that_has_changed_since(finished):
    done = finished.run("stages.parts.config.num_threads=7")
    assert done.returncode == 0, done.stderr
    threads = read_record(finished.run_dirs("parts")[0])["topology"]["num_threads"]
    told = f"parts: finished, and kept, with another topology (num_threads: {threads} -> 7)"
    assert f"[1/2] {told}: {finished.run_dirs('parts')[0]}" in done.stderr
    assert "[2/2] mixed: unchanged, and finished" in done.stderr


def test_pipeline_again_runs_only_what_changed(finished):
    before = read_record(finished.run_dirs("parts")[0])
    done = finished.run("stages.mixed.config.seed=1")
    assert done.returncode == 0, done.stderr
    assert "[1/2] parts: unchanged, and finished" in done.stderr
    assert read_record(finished.run_dirs("parts")[0]) == before
    assert len(finished.run_dirs("mixed")) == 2
    shown = json.loads(finished.run("--json", verb="status").stdout)
    assert [stage["state"] for stage in shown] == ["finished", "finished"]


def test_pipeline_failed_stage_stops_it_with_its_name_and_is_shown(tmp_path):
    pipeline = Pipeline(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1?"\n')
    done = pipeline.run()
    assert done.returncode == 1
    assert "stage parts ended with exit code 1" in done.stderr
    assert pipeline.run_dirs("mixed") == []
    parts, mixed = json.loads(pipeline.run("--json", verb="status").stdout)
    assert parts["state"] == "failed"
    assert "rows.jsonl:1" in parts["reason"]
    assert (mixed["state"], mixed["reason"]) == ("not started", "needs parts")


# Run by Python at its start, in the place of the stage: a library that ends the process.
ENDS = """
import sys, types
def end(*_):
    import ctypes
    ctypes.CDLL(None)._exit(0)
sys.modules["post_training.stages.split"] = types.SimpleNamespace(run=end)
"""


def test_pipeline_stage_that_a_library_ends_with_exit_code_0_has_failed(tmp_path, monkeypatch):
    pipeline = Pipeline(tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/sitecustomize.py").write_text(ENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=os.pathsep)
    done = pipeline.run()
    assert done.returncode == 1
    assert "stage parts ended with exit code 0, and its run is not finished" in done.stderr
    assert pipeline.run_dirs("mixed") == []


WAITS = """
import signal
from pathlib import Path
from post_training.data.transforms import register_transform

@register_transform("waits")
def waits(row):
    Path("waiting").touch()
    signal.pause()
"""


def test_pipeline_signalled_passes_it_to_the_stage_and_ends_as_it_does(tmp_path):
    pipeline = Pipeline(tmp_path)
    (tmp_path / "waits.py").write_text(WAITS)
    data = "{transforms: [waits.py], datasets: [{path: rows.jsonl, transform: waits}]}"
    process = pipeline.start(f"stages.parts.config.data={data}")
    wait_until(lambda: (tmp_path / "waiting").exists() or process.poll() is not None)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=TIMEOUT_S)[1]
    assert process.returncode == 143, stderr
    (run_dir,) = pipeline.run_dirs("parts")
    record = read_record(run_dir)
    assert (record["status"], record["reason"]) == ("interrupted", "stopped by SIGTERM")
