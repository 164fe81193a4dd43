"""`post-training pipeline submit` with stand-ins for Slurm's programs that write down their use."""

import json

import pytest

from post_training.core.files import write_json
from post_training.records.run import RunFolder
from post_training.records.run_record import SCHEMA

PIPELINE = """
run_dir: runs/exp
stages:
  parts:
    stage: split
    config: {data: {datasets: [{path: rows.jsonl}]}, eval_size: 1}
  mixed:
    stage: mix
    config: {data: {datasets: [{path: "${stages.parts.dataset}/train.jsonl"}]}}
    scheduler: {time: "02:00:00"}
  again:
    stage: mix
    needs: [mixed]
    config: {data: {datasets: [{path: "${stages.parts.dataset}/eval.jsonl"}]}}
"""


@pytest.fixture
def pipeline(slurm_command, tmp_path):
    """pipeline("submit", "key=value", queue="77 PENDING Priority")."""
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')

    def run(verb: str, *words: str, **keywords: str):
        environment = [] if verb == "status" else ["--environment=./post-training.toml"]
        return slurm_command("pipeline", verb, "pipeline.yaml", *environment, *words, **keywords)

    return run


def words(tmp_path, job_id: int) -> str:
    return (tmp_path / f"bin/sbatch-{job_id}").read_text().strip()


def folder(tmp_path, name: str):
    (found,) = (tmp_path / "runs/exp").glob(f"{name}-*")
    return found


def finish(tmp_path, name: str, image: str | None = None) -> None:
    """As if the stage had run."""
    outputs = {"artifacts": {"dataset": {"path": "dataset", "fingerprint": "1"}}}
    run_dir = folder(tmp_path, name)
    (run_dir / "dataset").mkdir()
    (run_dir / "dataset/artifact.json").touch()
    record = {"status": "finished", "run_id": "x", "attempts": [], "outputs": outputs}
    record["image"] = image and {"oci_digest": image}
    write_json(
        run_dir / "run.json",
        {"schema": SCHEMA, "stage": "mix", "reason": None, "recipe": {}, "topology": {}, **record},
    )


def test_pipeline_submit_queues_each_stage_after_those_it_needs(pipeline, tmp_path):
    done = pipeline("submit")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/exp\n"), done.stderr
    invalid = "--kill-on-invalid-dep=yes"
    assert words(tmp_path, 77) == f"{folder(tmp_path, 'parts')}/slurm/job.sh"
    assert words(tmp_path, 78).startswith(f"--dependency=afterok:77 {invalid} ")
    assert words(tmp_path, 79).startswith(f"--dependency=afterok:77,afterok:78 {invalid} ")
    script = (folder(tmp_path, "mixed") / "slurm/job.sh").read_text()
    assert "#SBATCH --job-name=mixed-exp\n" in script
    assert "#SBATCH --time=02:00:00\n" in script
    config = (folder(tmp_path, "mixed") / "slurm/config.yaml").read_text()
    assert f"path: {folder(tmp_path, 'parts')}/dataset/train.jsonl\n" in config


def test_pipeline_submit_finished_stage_is_left_out(pipeline, tmp_path):
    pipeline("submit")
    finish(tmp_path, "parts")
    done = pipeline("submit")
    assert "parts: unchanged, and finished" in done.stderr
    assert "--dependency" not in words(tmp_path, 80)
    assert words(tmp_path, 80).endswith(f"{folder(tmp_path, 'mixed')}/slurm/job.sh")


@pytest.mark.parametrize(
    ("made_in", "told"),
    [
        (f"sha256:{64 * '1'}", "unchanged, and finished"),
        (
            "sha256:222222222222ffff",
            "of another image (sha256:222222222222 -> sha256:111111111111)",
        ),
        (None, "of another image (unpinned -> sha256:111111111111)"),
    ],
)
def test_pipeline_submit_finished_stage_of_another_image_is_kept_and_told(
    pipeline, tmp_path, made_in, told
):
    with open(tmp_path / "base.toml", "a") as file:
        file.write(f'POST_TRAINING_IMAGE_OCI_DIGEST = "sha256:{64 * "1"}"\n')
    pipeline("submit")
    finish(tmp_path, "parts", made_in)
    shown = pipeline("submit", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    kept = "" if told.startswith("unchanged") else "finished, and kept, "
    assert f"# {kept}{told}: {folder(tmp_path, 'parts')}\n" in shown.stdout
    assert f"parts: {kept}{told}: {folder(tmp_path, 'parts')}\n" in pipeline("submit").stderr


def test_pipeline_submit_queued_stage_is_waited_for_and_not_queued_twice(pipeline, tmp_path):
    pipeline("submit")
    done = pipeline("submit", "stages.again.config.seed=1", queue="77 RUNNING None\n78 PENDING x\n")
    assert done.returncode == 0, done.stderr
    assert "mixed: in the queue already: job 78" in done.stderr
    assert words(tmp_path, 80).startswith("--dependency=afterok:77,afterok:78 ")
    assert not (tmp_path / "bin/sbatch-81").exists()


def test_pipeline_submit_refused_by_slurm_cancels_what_it_queued(pipeline, tmp_path):
    (tmp_path / "refuse").write_text("79")
    done = pipeline("submit")
    assert done.returncode == 1
    assert "no account" in done.stderr
    assert (tmp_path / "bin/cancelled").read_text() == "77 78\n"


def test_pipeline_submit_finished_stage_whose_artifact_is_gone_is_refused(pipeline, tmp_path):
    pipeline("submit")
    finish(tmp_path, "parts")
    (folder(tmp_path, "parts") / "dataset/artifact.json").unlink()
    done = pipeline("submit")
    assert done.returncode == 2
    assert "parts is finished, but its dataset is gone" in done.stderr


def test_pipeline_submit_dry_run_prints_and_leaves_nothing(pipeline, tmp_path):
    done = pipeline("submit", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "# ==== again, after parts, mixed\n" in done.stdout
    assert done.stdout.count("#!/bin/bash\n") == 3
    assert not (tmp_path / "runs").exists()


def test_pipeline_run_of_a_queued_stage_is_refused(pipeline, tmp_path):
    pipeline("submit")
    done = pipeline("run", queue="78 PENDING Priority\n")
    assert done.returncode == 2
    assert "mixed is in Slurm's queue as job 78" in done.stderr


def test_pipeline_status_says_what_each_stage_does_or_waits_for(pipeline, tmp_path):
    pipeline("submit")
    finish(tmp_path, "parts")
    run = RunFolder(folder(tmp_path, "mixed"))
    run.claim()
    queue = "78 RUNNING None\n79 PENDING Dependency\n"
    done = pipeline("status", "--json", queue=queue)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    run._lock.close()
    told = [(stage["name"], stage["state"], stage["reason"]) for stage in shown]
    assert told == [
        ("parts", "finished", None),
        ("mixed", "running", None),
        ("again", "waiting", "needs mixed"),
    ]
    lines = pipeline("status", queue=queue).stdout.splitlines()
    assert lines[1].split()[:4] == ["name", "stage", "state", "job"]
    assert lines[4].split() == ["again", "mix", "waiting", "79", "needs", "mixed"]


def test_pipeline_status_without_slurms_answer_warns_and_shows_the_records(pipeline, tmp_path):
    pipeline("submit")
    finish(tmp_path, "parts")
    (tmp_path / "bin/squeue").write_text("#!/bin/bash\nexit 1\n")
    done = pipeline("status", "--json")
    assert "warning: Slurm does not answer" in done.stderr
    assert [stage["state"] for stage in json.loads(done.stdout)] == [
        "finished", "ended", "not started",
    ]  # fmt: skip


def test_pipeline_status_before_any_run_says_so(pipeline):
    done = pipeline("status")
    assert done.returncode == 2
    assert "no pipeline was run or submitted here" in done.stderr
