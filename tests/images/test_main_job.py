"""`entrypoint` in the built image: record, refusals, signals, several processes."""

import json
import re
import signal
import subprocess
from collections.abc import Callable

import pytest

from helpers.kept_bytes import kept_bytes
from helpers.slurm_cluster import wait_until
from post_training.core.hashing import fingerprint, sha256_file
from post_training.records.run import is_live
from post_training.records.run_record import read_record

pytestmark = pytest.mark.image


@pytest.fixture
def start(cli, image_edf, job):
    """Start `entrypoint ARGUMENTS` and come back once `is_there()` holds."""

    def begin(*arguments: str, is_there: Callable[[], bool]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [cli, "edf", "run", image_edf, "--", "entrypoint", *arguments],
            cwd=job,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: is_there() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        return process

    return begin


def test_record_of_a_finished_run_says_what_it_was(job, image_edf):
    record = read_record(job / "run")
    pinned = image_edf.read_text()
    assert record["status"] == "finished"
    assert record["image"]["verified_by"] == "runner"
    for key in ("oci_digest", "sqsh_sha256", "input_hash"):
        assert record["image"][key] in pinned
    assert record["reproducible_by_digest"] is True
    assert record["command"] == ["entrypoint", "sft", "sft.yaml"]
    assert record["inputs"]["data.datasets[0].path"] == {
        "path": str(job / "sums.jsonl"),
        "fingerprint": sha256_file(job / "sums.jsonl"),
    }
    assert record["inputs"]["model.path"]["fingerprint"] == fingerprint(job / "init/model")
    assert record["recipe"]["training.learning_rate"] == 1e-3
    assert record["topology"]["world_size"] == 1
    assert record["environment"]["POST_TRAINING_SITE"] == "laptop"
    assert record["packages"]["torch"] == "2.13.0+cpu"
    [attempt] = record["attempts"]
    assert attempt["status"] == "finished"
    model = record["outputs"]["artifacts"]["model"]
    assert model["fingerprint"] == fingerprint(job / "run/model")
    weights = job / "run/model/model.safetensors"
    assert record["outputs"]["files"]["model/model.safetensors"] == sha256_file(weights)
    artifact = json.loads((job / "run/model/artifact.json").read_text())
    assert artifact["fingerprint"] == model["fingerprint"]
    assert artifact["made_by"]["run_id"] == record["run_id"]
    assert len((job / "run/metrics.jsonl").read_text().splitlines()) == 4


def test_record_holds_only_allowed_variables(entrypoint, job):
    done = entrypoint(
        "init-model", "init.yaml", "run_dir=secret", HF_TOKEN="hf_planted", SLURM_JWT="j"
    )
    assert done.returncode == 0, done.stderr
    assert "hf_planted" not in done.stdout + done.stderr
    for path in (job / "secret").rglob("*"):
        assert path.is_dir() or b"hf_planted" not in path.read_bytes()
    assert "SLURM_JWT" not in read_record(job / "secret")["environment"]


def test_runs_show_prints_identity_and_outcome(job, post_training):
    shown = post_training("runs", "show", job / "run").stdout
    record = read_record(job / "run")
    for text in (record["run_id"], record["image"]["oci_digest"], "verified by runner", "finished"):
        assert text in shown
    shown = json.loads(post_training("runs", "show", job / "run", "--json").stdout)
    assert shown == {**record, "state": "finished", "faults": []}
    missing = post_training("runs", "show", job)
    assert (missing.returncode, missing.stderr) == (
        2, f"error: {job}: no run here: there is no run.json\n",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["sft", "sft.yaml", "training.lerning_rate=1"], 2, "did you mean 'learning_rate'?"),
        (["sft", "sft.yaml", "training.max_steps=many"], 2, "must be an integer (got 'many')"),
        (["sft", "none.yaml"], 2, "none.yaml: no such file"),
        (["sft", "sft.yaml", "model.path=none"], 2, "model.path: no such file or folder: none"),
        (["sfd", "sft.yaml"], 2, "no stage 'sfd'"),
        (["sft", "sft.yaml", "run_dir=bad1", "data.datasets[0].path=broken.jsonl"], 1,
         "broken.jsonl:2: "),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_no_model(entrypoint, job, arguments, code, line):
    (job / "broken.jsonl").write_text('{"question": "1?", "answer": "1"}\n{"question": "2?", \n')
    done = entrypoint(*arguments)
    assert done.returncode == code, done.stderr
    assert [text for text in done.stderr.splitlines() if line in text and "error: " in text]
    assert "Traceback" not in done.stderr
    assert not (job / "bad1/model").exists()


def test_failed_run_is_closed_with_its_reason_and_can_be_repaired(entrypoint, job):
    (job / "repair.jsonl").write_text("{\n")
    arguments = ["sft", "sft.yaml", "run_dir=repair", "data.datasets[0].path=repair.jsonl"]
    assert entrypoint(*arguments).returncode == 1
    record = read_record(job / "repair")
    assert record["status"] == "failed"
    assert "repair.jsonl:1" in record["reason"]
    assert record["attempts"][0]["ended"]
    (job / "repair.jsonl").write_text((job / "sums.jsonl").read_text())
    done = entrypoint(*arguments)
    assert done.returncode == 0, done.stderr
    assert "(failed before it made anything)" in done.stderr
    assert read_record(job / "repair")["status"] == "finished"


def test_without_a_pinned_image_it_refuses_and_unpinned_says_so(inside, job):
    command = [
        "env",
        "-u",
        "POST_TRAINING_IMAGE_OCI_DIGEST",
        "entrypoint",
        "init-model",
        "init.yaml",
    ]
    refused = inside(*command, "run_dir=unpinned", cwd=job)
    assert refused.returncode == 2
    assert "no image digest is pinned" in refused.stderr
    assert not (job / "unpinned").exists()
    assert inside(*command, "run_dir=unpinned", "--unpinned", cwd=job).returncode == 0
    record = read_record(job / "unpinned")
    assert (record["image"], record["reproducible_by_digest"]) == (None, False)


def test_wrong_input_hash_is_refused(inside, job):
    command = ["env", f"POST_TRAINING_IMAGE_INPUT_HASH={'0' * 64}", "entrypoint"]
    done = inside(*command, "init-model", "init.yaml", "run_dir=other", cwd=job)
    assert done.returncode == 1
    assert f"the EDF pins {'0' * 64}" in done.stderr


def test_claimed_image_digest_is_refused_and_leaves_no_run(inside, job):
    command = ["env", f"POST_TRAINING_IMAGE_OCI_DIGEST=sha256:{'a' * 64}", "entrypoint"]
    done = inside(*command, "init-model", "init.yaml", "run_dir=claimed", cwd=job)
    assert done.returncode == 1
    assert f"claims sha256:{'a' * 64}" in done.stderr
    assert not (job / "claimed").exists()


def test_what_the_host_leaves_behind_does_not_choose_the_stages_python(inside, job):
    """As another engine would let it in."""
    left = ["PYTHONHOME=/opt/host", "PYTHONPATH=/opt/host", "TMPDIR=host-only", "BASH_ENV=/x"]
    done = inside("env", *left, "entrypoint", "doctor", cwd=job)
    assert "Fatal Python error" not in done.stderr
    assert "temporary: /tmp" in done.stdout


def test_file_of_the_working_folder_is_not_taken_for_a_module(inside, job):
    folder = job / "modules"
    folder.mkdir()
    (folder / "argparse.py").write_text("raise SystemExit('of the working folder')")
    done = inside("entrypoint", "doctor", cwd=folder)
    assert "of the working folder" not in done.stderr
    assert "temporary: /tmp" in done.stdout


def test_doctor_names_variables_that_point_to_nowhere_and_foreign_code(inside, job):
    left = ["SSL_CERT_FILE=/etc/host-only.pem", "XDG_RUNTIME_DIR=/run/user/4711", "LD_PRELOAD=x.so"]
    done = inside("env", *left, "entrypoint", "doctor", cwd=job)
    for line in (
        "SSL_CERT_FILE names /etc/host-only.pem, which is not here",
        "XDG_RUNTIME_DIR names /run/user/4711, which is not here",
        "other code than the image's may run: LD_PRELOAD: runs are not reproducible by digest",
    ):
        assert line in done.stdout


def test_another_engine_makes_the_entrypoint_verify(inside, job):
    """Without our runner's findings the entrypoint reads the image file itself."""
    script = "mount -t tmpfs tmpfs /run && exec entrypoint init-model init.yaml run_dir=engine"
    done = inside("sh", "-c", script, cwd=job)
    assert done.returncode == 0, done.stderr
    image = read_record(job / "engine")["image"]
    assert (image["verified_by"], image["check"]) == ("entrypoint", "hashed")


def test_second_run_into_a_finished_folder_is_refused(entrypoint, job):
    before = {path: path.stat().st_mtime_ns for path in (job / "run").rglob("*")}
    done = entrypoint("sft", "sft.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: run: this run is finished")
    done = entrypoint("sft", "sft.yaml", "training.learning_rate=1e-4")
    assert done.returncode == 2
    assert "recipe: training.learning_rate: 0.001 -> 0.0001" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (job / "run").rglob("*")} == before


def test_folder_with_other_files_is_refused_and_kept(entrypoint, job):
    (job / "foreign").mkdir()
    (job / "foreign/thesis.txt").write_text("years of work")
    done = entrypoint("sft", "sft.yaml", "run_dir=foreign")
    assert done.returncode == 2
    assert "holds no run (found 'thesis.txt')" in done.stderr
    assert [path.name for path in (job / "foreign").iterdir() if path.name != ".lock"] == [
        "thesis.txt"
    ]


def test_sigterm_closes_the_record_and_the_same_command_continues(start, entrypoint, job):
    arguments = ["sft", "sft.yaml", "run_dir=stopped", "training.max_steps=100",
                 "checkpointing.save_steps=10"]  # fmt: skip
    reference = entrypoint(*arguments[:2], "run_dir=whole", *arguments[3:])
    assert reference.returncode == 0, reference.stderr
    metrics = job / "stopped/metrics.jsonl"
    process = start(
        *arguments, is_there=lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 12
    )
    process.send_signal(signal.SIGSTOP)  # Its last step must not come before ours.
    assert is_live(job / "stopped")
    second = entrypoint(*arguments)
    assert second.returncode == 2
    assert "a run is live in this folder (process" in second.stderr
    process.terminate()
    process.send_signal(signal.SIGCONT)
    said = process.stderr.read()
    assert process.wait() == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "error: stopped by SIGTERM"
    record = read_record(job / "stopped")
    assert (record["status"], record["reason"]) == ("interrupted", "stopped by SIGTERM")
    assert not (job / "stopped/model").exists()
    assert entrypoint(*arguments).returncode == 0
    record = read_record(job / "stopped")
    assert [attempt["status"] for attempt in record["attempts"]] == ["interrupted", "finished"]
    assert kept_bytes(record) == kept_bytes(read_record(job / "whole"))


def test_sigkill_leaves_a_record_that_show_tells_as_killed(start, job, post_training):
    process = start("sft", "sft.yaml", "run_dir=killed", is_there=(job / "killed/run.json").exists)
    process.kill()
    process.wait()
    assert read_record(job / "killed")["status"] == "running"
    assert (
        "killed (its record was never closed)"
        in post_training("runs", "show", job / "killed").stdout
    )


def test_two_processes_share_one_record(entrypoint, job):
    done = entrypoint("sft", "sft.yaml", "run_dir=two", "num_processes=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("starting sft-") == 1
    record = read_record(job / "two")
    assert record["topology"]["world_size"] == 2
    assert len(record["attempts"]) == 1
    other = entrypoint("sft", "sft.yaml", "run_dir=two")
    assert "topology: num_threads: 1 -> 2; world_size: 2 -> 1" in other.stderr


def test_two_processes_fail_together_with_one_line(entrypoint, job):
    (job / "broken.jsonl").write_text("{\n")
    done = entrypoint("sft", "sft.yaml", "run_dir=two-fail", "num_processes=2",
                      "data.datasets[0].path=broken.jsonl")  # fmt: skip
    assert done.returncode == 1
    assert re.findall(r"^error: .*$", done.stderr, re.MULTILINE) == [
        line for line in done.stderr.splitlines() if "broken.jsonl:1" in line
    ]
    assert read_record(job / "two-fail")["status"] == "failed"
