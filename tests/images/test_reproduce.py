"""`reproduce` and lineage, of runs in the built image: identical, or the first difference; refusals
that name what stands in the way."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from post_training.core.hashing import sha256_file, sha256_value
from post_training.records.run import RunDescription
from post_training.records.run_record import read_record

pytestmark = pytest.mark.image


def test_reproduce_is_identical_for_two_processes(entrypoint, job, post_training):
    done = entrypoint("sft", "sft.yaml", "run_dir=pair", "num_processes=2")
    assert done.returncode == 0, done.stderr
    done = post_training("reproduce", job / "pair")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "identical"), done.stderr


def test_reproduce_is_identical_from_any_folder(job, post_training):
    done = post_training("reproduce", job / "run")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"identical: \d+ files and 4 lines of metrics\n", done.stdout)
    verdict = json.loads((job / "run-reproduced-1/reproduction.json").read_text())
    assert verdict["reproduces"] == read_record(job / "run")["run_id"]
    again = read_record(job / "run-reproduced-1")
    assert again["identity"] == read_record(job / "run")["identity"]


def test_reproduce_of_a_command_compares_what_it_made(entrypoint, job, post_training):
    words = ("--input", "data=sums.jsonl", "--output", "kept=out", "--", "sh", "-c")
    verdicts = {}
    for name, command in (("copied", "cp data out"), ("timed", "cp data out; date +%N >> out")):
        done = entrypoint("exec", f"run_dir={name}", *words, command)
        assert done.returncode == 0, done.stderr
        assert read_record(job / name)["image"]["verified_by"] == "runner"
        done = post_training("reproduce", job / name)
        verdicts[name] = (done.returncode, done.stdout.split("\n")[0])
    assert verdicts["copied"] == (0, "identical: 1 files")
    assert verdicts["timed"][0] == 4
    assert verdicts["timed"][1].startswith("differs: kept/out")
    again = read_record(job / "copied-reproduced-1")
    assert again["identity"] == read_record(job / "copied")["identity"]


def test_reproduce_names_the_first_difference(job, post_training, tmp_path, forge):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", job / "run", run], check=True)
    metrics, steps = run / "metrics.jsonl", run / "steps.jsonl"
    lines = metrics.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": 1.5})
    metrics.write_text("\n".join(lines) + "\n")
    # A slip is refused before anything is run; what was forged is told by running it again.
    done = post_training("reproduce", run)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {run}: not what the run left: metrics.jsonl: changed" in done.stderr
    assert not (tmp_path / "run-reproduced-1").exists()
    forge(run, lambda record: None)
    done = post_training("reproduce", run)
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("differs: metrics.jsonl: step 3: loss is 1.5, then ")
    lines = steps.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "loss": 1.5})
    steps.write_text("\n".join(lines) + "\n")
    digest = sha256_file(steps)
    forge(run, lambda record: record["outputs"]["files"].update({"steps.jsonl": digest}))
    done = post_training("reproduce", run)
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("differs: step 2: the same rows, loss is 1.5, then ")


def test_reproduce_on_another_machine_is_equivalent_within_the_tolerance(
    job, post_training, tmp_path, forge
):
    subprocess.run(["cp", "-r", job / "run", tmp_path / "run"], check=True)
    metrics = tmp_path / "run/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[3]["loss"] *= 1.001
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    forge(tmp_path / "run", lambda record: record["machine"].update(processor="another"))
    done = post_training("reproduce", tmp_path / "run")
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("equivalent: the figures are off by at most 1.0e-03 (tolerance ")
    done = post_training("reproduce", tmp_path / "run", "--tolerance", "0.0001")
    assert done.returncode == 4
    assert done.stdout.startswith("differs: metrics.jsonl: step 4: loss is ")


def test_reproduce_upstream_runs_each_ancestor_again_and_trains_on_what_it_made(job, post_training):
    done = post_training("reproduce", job / "run/model", "--upstream", "--dry-run")
    assert (done.returncode, done.stdout) == (0, "2 runs would be run again\n"), done.stderr
    done = post_training("reproduce", job / "run/model", "--upstream", "--run-dir", job / "chain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ")
    [init_model] = [path.parent for path in job.glob("init-reproduced-*/run.json")]
    assert read_record(job / "chain")["inputs"]["model.path"]["path"] == f"{init_model}/model"


def test_reproduce_stale_runs_again_what_made_the_inputs_that_are_gone(job, post_training):
    def answer(*options: str):
        done = post_training("reproduce", job / "run", "--dry-run", *options)
        return done.returncode, done.stdout, done.stderr

    assert answer("--stale")[:2] == (0, "ready to run again\n")
    (job / "init/model").rename(job / "init/away")
    try:
        code, _, problem = answer()
        assert code == 2
        assert f"model.path: gone: {job}/init/model" in problem
        assert answer("--stale")[:2] == (0, "2 runs would be run again\n")
    finally:
        (job / "init/away").rename(job / "init/model")


def test_artifact_lineage_goes_back_to_the_data(job, post_training):
    shown = post_training("artifact", "lineage", job / "run/model").stdout.splitlines()
    assert re.match(r"├─ model\.path: .*/init/model \(model of init-model-", shown[1])
    assert re.match(r"│  └─ corpus\[0\]: .*/sums\.jsonl \(fingerprint ", shown[2])
    assert post_training("artifact", "verify", job / "run/model").stdout.startswith("ok: ")
    shown = post_training("artifact", "show", job / "run/model").stdout
    assert read_record(job / "run")["run_id"] in shown


def test_reproduce_changed_input_or_missing_image_is_refused(job, post_training, tmp_path, forge):
    subprocess.run(["cp", "-r", job / "run", tmp_path / "run"], check=True)
    change = {"fingerprint": "0" * 64}
    forge(tmp_path / "run", lambda record: record["inputs"]["model.path"].update(change))
    record = read_record(tmp_path / "run")
    done = post_training("reproduce", tmp_path / "run")
    assert done.returncode == 2
    assert f"error: model.path: changed: {job}/init/model" in done.stderr
    done = post_training("reproduce", job / "run", "--store", tmp_path / "empty")
    assert done.returncode == 2
    assert f"no image '{record['image']['oci_digest']}' in the store" in done.stderr
    assert not (tmp_path / "run-reproduced-1").exists()


def test_development_mount_is_recorded_and_not_reproducible(cli, image_edf, job, post_training):
    checkout = Path(__file__).parents[2]
    done = subprocess.run(
        [cli, "edf", "run", "--dev", checkout, image_edf, "--", "entrypoint", "init-model",
         "init.yaml", "run_dir=dev"],
        cwd=job, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = read_record(job / "dev")
    assert record["code"]["from"] == "development mount"
    assert {"commit", "diff", "untracked"} <= set(record["code"])
    refused = post_training("reproduce", job / "dev")
    assert refused.returncode == 2
    assert "development mount" in refused.stderr


def test_package_mounted_over_the_images_is_recorded_and_not_reproducible(
    image_edf, job, post_training
):
    version = read_record(job / "run")["packages"]["filelock"]
    (job / "METADATA").write_text("Metadata-Version: 2.1\nName: filelock\nVersion: 0.0.1\n")
    place = "/opt/post-training/venv/lib/python3.11/site-packages"
    place += f"/filelock-{version}.dist-info/METADATA"
    (job / "planted.toml").write_text(
        f'base_environment = "{image_edf}"\nmounts = ["{job}/METADATA:{place}:ro"]\n'
    )
    words = ["entrypoint", "sft", "sft.yaml", "run_dir=planted"]
    done = post_training("edf", "run", "./planted.toml", "--", *words, cwd=job)
    assert done.returncode == 0, done.stderr
    refused = post_training("reproduce", job / "planted")
    assert refused.returncode == 2
    assert f"{place} of its image was mounted over" in refused.stderr
    told = post_training("runs", "diff", job / "run", job / "planted").stdout
    assert f"packages     filelock: '{version}' -> '0.0.1'" in told.splitlines()


@pytest.mark.parametrize(
    ("words", "key", "found"),
    [
        (["env", "LD_PRELOAD=libm.so.6"], "foreign_variables", {"LD_PRELOAD": "libm.so.6"}),
        (["env", "GLIBC_TUNABLES=glibc.malloc.check=0"], "foreign_variables",
         {"GLIBC_TUNABLES": "glibc.malloc.check=0"}),
        ([], "mounted_over", ["/usr/lib/python3.11/random.py"]),
        (["env", "A=1"], "mounted_over", ["/"]),
    ],
)  # fmt: skip
def test_foreign_code_is_recorded_and_not_reproducible(
    image_edf, job, post_training, tmp_path, words, key, found
):
    mounts = []
    if found == ["/"]:
        writable = tmp_path / "writable.toml"
        writable.write_text(f'base_environment = "{image_edf}"\nwritable = true\n')
        image_edf = writable
    elif key == "mounted_over":
        copied = post_training("edf", "run", image_edf, "--", "cat", *found).stdout
        (tmp_path / "random.py").write_text(copied)
        mounts = ["--mount", f"{tmp_path}/random.py:{found[0]}:ro"]
    command = [*words, "entrypoint", "init-model", "init.yaml", f"run_dir={tmp_path}/run"]
    mounts += ["--mount", f"{tmp_path}:{tmp_path}"]
    done = post_training("edf", "run", *mounts, image_edf, "--", *command, cwd=job)
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "run")
    assert (record[key], record["reproducible_by_digest"]) == (found, False)
    refused = post_training("reproduce", tmp_path / "run")
    assert refused.returncode == 2
    assert (next(iter(found)) if found != ["/"] else "image was writable") in refused.stderr


def test_reproduce_record_that_claims_another_image_is_refused(job, post_training, tmp_path):
    """Also one whose sums were all made anew."""
    shutil.copytree(job / "run", tmp_path / "run")
    record = read_record(tmp_path / "run")
    record["image"]["oci_digest"] = f"sha256:{'a' * 64}"
    known = {key: record[key] for key in ("stage", "recipe", "topology", "inputs", "image")}
    record["identity"] = RunDescription(**known, facts={}).identity
    record["seal"] = sha256_value({key: value for key, value in record.items() if key != "seal"})
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    done = post_training("reproduce", tmp_path / "run", "--dry-run")
    assert done.returncode == 2
    assert f"oci_digest is sha256:{'a' * 64}, and that of the image is sha256:" in done.stderr
