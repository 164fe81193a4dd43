"""`post-training submit` with stand-ins for sbatch and squeue that write down their use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.slurm_programs import EDF as EDF_OF_AN_IMAGE
from post_training.core.files import write_json
from post_training.images.edf import load_edf
from post_training.records.run import RunFolder
from post_training.records.run_record import SCHEMA
from post_training.slurm.queue import cancel_on_error

SFT = """
model: {path: model}
data: {chat_template: chatml, datasets: [{path: x.jsonl}]}
training:
  {max_steps: 4, effective_batch_size: 4, per_device_train_batch_size: 2, learning_rate: 1e-3}
sft: {max_seq_length: 64}
run_dir: run
"""


@pytest.fixture
def submit(slurm_command, tmp_path):
    """submit("run_dir=x", "--nodes=2", queue="77 PENDING Priority"): in a folder with sft.yaml."""
    (tmp_path / "sft.yaml").write_text(SFT)

    def run(*words: str, **keywords: str):
        command = ("submit", "sft", "sft.yaml", "--environment=./post-training.toml")
        return slurm_command(*command, *words, **keywords)

    return run


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_submit_writes_all_that_the_job_reads_and_prints_its_id(submit, tmp_path):
    done = submit("training.max_steps=9")
    assert (done.returncode, done.stdout) == (0, "77\n"), done.stderr
    folder = tmp_path / "run/slurm"
    names = {"config.yaml", "environment.toml", "failures.json", "job.sh", "submission.json"}
    assert files(folder) == {*names, ".lock"}
    assert str(folder / "slurm-77.out") in done.stderr
    words = (tmp_path / "bin/sbatch-words").read_text().split("\0")[:-1]
    assert words == ["--parsable", str(folder / "job.sh")]
    submission = json.loads((folder / "submission.json").read_text())
    assert (submission["job_id"], submission["site"]) == ("77", "laptop")
    assert submission["command"][-1] == "training.max_steps=9"


def test_submit_frozen_files_need_nothing_that_may_be_edited(submit, tmp_path):
    submit("training.max_steps=9")
    for name in ("sft.yaml", "base.toml", "post-training.toml"):
        (tmp_path / name).unlink()
    folder = tmp_path / "run/slurm"
    edf = load_edf(folder / "environment.toml", {"PWD": str(tmp_path)}, tmp_path)
    assert edf.env["POST_TRAINING_IMAGE_SQSH_SHA256"] == "33"
    assert edf.env["EXTRA"] == "1"
    assert [str(mount) for mount in edf.mounts] == [f"{tmp_path}:{tmp_path}"]
    config = (folder / "config.yaml").read_text()
    assert "max_steps: 9\n" in config
    assert f"run_dir: {tmp_path}/run\n" in config


def test_submit_frozen_configuration_reads_back_equal(submit, tmp_path):
    submit()
    frozen = (tmp_path / "run/slurm/config.yaml").read_text()
    (tmp_path / "sft.yaml").write_text(frozen)
    assert submit("run_dir=again").returncode == 0
    again = (tmp_path / "again/slurm/config.yaml").read_text()
    assert again == frozen.replace(f"{tmp_path}/run\n", f"{tmp_path}/again\n")


def test_submit_dry_run_prints_the_files_and_leaves_nothing(submit, tmp_path):
    done = submit("--dry-run", "--time=02:00:00")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=02:00:00\n" in done.stdout
    assert 'POST_TRAINING_IMAGE_SQSH_SHA256 = "33"\n' in done.stdout
    assert "learning_rate: 0.001\n" in done.stdout
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "bin/sbatch-words").exists()


def test_submit_to_a_site_of_sarus_takes_an_image_of_a_registry(submit, tmp_path):
    edf = EDF_OF_AN_IMAGE.replace('"laptop"', '"clariden-sarus"')
    (tmp_path / "base.toml").write_text(edf)
    options = ("--dry-run", "--site=clariden-sarus", "training.effective_batch_size=8")
    refused = submit(*options)
    assert refused.returncode == 2
    assert "image: must be REGISTRY/NAME@sha256:… on this site (got 'image.sqsh')" in refused.stderr
    reference = f"ghcr.io/me/cpu@sha256:{'7' * 64}"
    (tmp_path / "base.toml").write_text(edf.replace("image.sqsh", reference))
    done = submit(*options)
    assert done.returncode == 0, done.stderr
    assert f"    --edf={tmp_path}/run/slurm/environment.toml\n" in done.stdout
    assert "--environment=" not in done.stdout
    assert f'image = "{reference}"\n' in done.stdout


def test_submit_to_a_site_of_singularity_takes_the_edfs_mounts_and_variables(submit, tmp_path):
    edf = EDF_OF_AN_IMAGE.replace('"laptop"', '"lumi"').replace('"]', '", "/only/on/nodes:/x:ro"]')
    (tmp_path / "base.toml").write_text(edf)
    options = ("--dry-run", "--site=lumi", "training.effective_batch_size=16")
    refused = submit(*options)
    assert refused.returncode == 2
    assert "Singularity needs a SIF (got image.sqsh)" in refused.stderr
    (tmp_path / "base.toml").write_text(edf.replace("image.sqsh", f"{tmp_path}/image.sif"))
    (tmp_path / "image.sif").touch()
    done = submit(*options)
    assert done.returncode == 0, done.stderr
    for line in (
        "export SINGULARITYENV_EXTRA=1",
        "export SINGULARITYENV_POST_TRAINING_IMAGE_SQSH_SHA256=33",
        f"    --bind={tmp_path}",
        "    --bind=/only/on/nodes:/x:ro",
        f"    {tmp_path}/image.sif",
    ):
        assert f"{line}\n" in done.stdout
    assert "environment.toml" not in done.stdout


def test_submit_from_within_a_job_hides_its_variables(submit, tmp_path):
    submit(SBATCH_PARTITION="other", SLURM_JOB_ID="5", SLURM_CONF="/conf", KEPT="yes")
    env = (tmp_path / "bin/sbatch-env").read_text()
    assert "KEPT=yes" in env
    assert "SLURM_CONF=/conf" in env
    assert "SBATCH_PARTITION" not in env
    assert "SLURM_JOB_ID" not in env


def test_submit_queued_folder_is_refused_and_a_gone_job_is_not(submit, tmp_path):
    submit()
    before = (tmp_path / "run/slurm/job.sh").stat().st_mtime_ns
    done = submit(queue="76 RUNNING None\n77 PENDING Priority\n")
    assert done.returncode == 2
    assert "job 77 is already in the queue for this folder (pending)" in done.stderr
    assert (tmp_path / "run/slurm/job.sh").stat().st_mtime_ns == before
    assert submit(queue="76 RUNNING None\n").returncode == 0


QUEUE = """\
CLUSTER: west
welcome to the cluster
77 PENDING Priority|{folder}/slurm/job.sh
78 PENDING |/elsewhere/slurm/job.sh
"""


def test_submit_reads_the_queue_whatever_the_shell_has_set_for_slurm(submit, tmp_path):
    submit()
    done = submit(queue=QUEUE.format(folder="/x"), SLURM_CLUSTERS="west", SQUEUE_SORT="S")
    assert done.returncode == 2
    assert "job 77 is already in the queue" in done.stderr
    seen = (tmp_path / "bin/squeue-env").read_text()
    assert "SLURM_CLUSTERS" not in seen
    assert "SQUEUE_SORT" not in seen


def test_submit_of_what_only_the_queue_knows_is_refused(submit, tmp_path):
    submit()
    # As if it had been killed between sbatch and the record.
    (tmp_path / "run/slurm/submission.json").unlink()
    done = submit(queue=QUEUE.format(folder=tmp_path / "run"))
    assert done.returncode == 2
    assert "job 77 is already in the queue for this folder (pending)" in done.stderr
    assert "hint: `scancel 77` stops it for good" in done.stderr
    assert submit(queue=QUEUE.format(folder=tmp_path / "other")).returncode == 0


def test_submit_whose_record_cannot_be_written_cancels_the_job(submit, tmp_path):
    (tmp_path / "run/slurm/submission.json/x").mkdir(parents=True)
    done = submit()
    assert done.returncode == 1
    assert "is a directory" in done.stderr
    assert (tmp_path / "bin/cancelled").read_text() == "77\n"


def test_cancel_on_error_names_what_slurm_did_not_end_and_keeps_the_error(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="disk is full"), cancel_on_error(["77", "78"]):
        raise OSError("the disk is full")
    assert "still queued, stop it by `scancel 77 78`" in capsys.readouterr().err


FAILS_TWICE = """\
#!/bin/bash
calls="$(dirname "$0")/squeue-calls"
[[ ! -s $calls ]] || { sed -i s/x// "$calls"; echo Socket timed out >&2; exit 1; }
"""


def test_submit_asks_again_when_slurm_does_not_answer(submit, tmp_path):
    submit()
    squeue = tmp_path / "bin/squeue"
    (tmp_path / "bin/squeue-calls").write_text("xx")
    squeue.write_text(squeue.read_text().replace("#!/bin/bash\n", FAILS_TWICE))
    done = submit(queue="77 PENDING Priority")
    assert (done.returncode, "job 77 is already in the queue" in done.stderr) == (2, True)
    assert (tmp_path / "bin/squeue-calls").read_text().strip() == ""


# With a limit that no answer can keep.
IMPATIENT = """
from post_training import cli
from post_training.slurm import submit
submit._SBATCH_TIMEOUT_S = 0.1
cli.main()
"""


@pytest.fixture
def submit_unanswered(submit, tmp_path, monkeypatch):
    """submit_unanswered("--chain=2", queue=…): sbatch never answers."""
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\nexec sleep infinity\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def run(*words: str, queue: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "bin/queue").write_text(queue)
        command = ["submit", "sft", "sft.yaml", "--environment=./post-training.toml", *words]
        return subprocess.run(
            [sys.executable, "-c", IMPATIENT, *command],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    return run


def test_submit_sbatch_without_an_answer_takes_the_job_that_the_queue_has(
    submit_unanswered, submit, tmp_path
):
    queue = QUEUE.format(folder=tmp_path / "run")
    done = submit_unanswered(queue=queue)
    assert (done.returncode, done.stdout) == (0, "77\n"), done.stderr
    assert "warning: sbatch: no answer in 0.1 s, and the queue has the job: 77" in done.stderr
    assert json.loads((tmp_path / "run/slurm/submission.json").read_text())["job_id"] == "77"
    assert "job 77 is already in the queue" in submit(queue=queue).stderr


def test_submit_chain_without_answers_takes_each_job_once(submit_unanswered, tmp_path):
    script = tmp_path / "run/slurm/job.sh"
    queue = "".join(f"{job_id} PENDING |{script}\n" for job_id in (77, 78, 79))
    done = submit_unanswered("--chain=3", queue=queue)
    assert (done.returncode, done.stdout) == (0, "77\n"), done.stderr
    assert (tmp_path / "run/slurm/chain").read_text() == "77\n78\n79\n"


def test_submit_sbatch_without_an_answer_that_the_queue_does_not_know_is_an_error(
    submit_unanswered, submit, tmp_path
):
    done = submit_unanswered(queue=QUEUE.format(folder="/elsewhere"))
    assert done.returncode == 1
    assert "error: sbatch: no answer in 0.1 s, and the queue has no such job\n" in done.stderr
    assert not (tmp_path / "run/slurm/submission.json").exists()
    # Slurm takes it only now.
    again = submit(queue=QUEUE.format(folder=tmp_path / "run"))
    assert (again.returncode, "job 77 is already in the queue" in again.stderr) == (2, True)


def test_submit_finished_run_is_refused(submit, tmp_path):
    (tmp_path / "run").mkdir()
    record = {"schema": SCHEMA, "status": "finished", "run_id": "sft-1", "attempts": [{}]}
    write_json(tmp_path / "run/run.json", record)
    done = submit()
    assert (done.returncode, files(tmp_path / "run")) == (2, {"run.json"})
    assert "this run is finished (run sft-1)" in done.stderr


def test_submit_unfinished_run_keeps_its_files_and_counts_from_there(submit, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest").write_text("checkpoint-4\n")
    record = {"schema": SCHEMA, "status": "failed", "run_id": "sft-1", "attempts": [{}, {}]}
    write_json(tmp_path / "run/run.json", record)
    (tmp_path / "run/slurm").mkdir()
    (tmp_path / "run/slurm/failures-2.json").touch()  # What a worker of the job before counted.
    assert submit().returncode == 0
    assert not (tmp_path / "run/slurm/failures-2.json").exists()
    assert (tmp_path / "run/checkpoints/latest").read_text() == "checkpoint-4\n"
    tally = json.loads((tmp_path / "run/slurm/failures.json").read_text())
    assert (tally["num_failures"], tally["num_attempts"], tally["checkpoint"]) == (
        0, 2, "checkpoint-4",
    )  # fmt: skip


def test_submit_live_run_is_refused(submit, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    done = submit()
    folder._lock.close()
    assert done.returncode == 2
    assert "a run is live in this folder" in done.stderr


def test_submit_folder_of_something_else_is_refused(submit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    done = submit()
    assert done.returncode == 2
    assert "holds no run (found 'thesis.tex')" in done.stderr


def test_submit_refused_by_slurm_says_why_and_can_be_repeated(submit, tmp_path):
    (tmp_path / "refuse").touch()
    done = submit()
    assert (done.returncode, done.stdout) == (1, "")
    assert "no account" in done.stderr
    (tmp_path / "refuse").unlink()
    assert submit().returncode == 0


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["run_dir=null"], "run_dir is not set, and a submitted run needs one"),
        (["run_dir=/elsewhere"], "the run folder is not mounted inside the image"),
        (["training.lr=1"], "training.lr"),
        (["debug.enabled=true", "debug.override_existing=true"], "debug.override_existing"),
        (["--site=mars"], "no site 'mars'"),
        (
            ["--site=clariden", "training.effective_batch_size=8"],
            "this EDF is of the site 'laptop', not of 'clariden'",
        ),
        (["--time=1"], "time: must be over 120 s"),
        (["--nodes=3"], "effective_batch_size"),
        (["--dev=bin"], "not a checkout of this project"),
        (["--environment=./none.toml"], "no such EDF"),
    ],
)
def test_submit_what_cannot_run_is_refused_and_leaves_nothing(submit, tmp_path, words, fault):
    done = submit(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert fault in done.stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "bin/sbatch-words").exists()


def test_submit_unpinned_image_is_refused(submit, tmp_path):
    (tmp_path / "base.toml").write_text(
        EDF_OF_AN_IMAGE.replace("POST_TRAINING_IMAGE_SQSH_SHA256", "X")
    )
    assert "no image digest is pinned" in submit().stderr


def test_submit_working_folder_that_is_not_mounted_is_refused(submit, tmp_path):
    (tmp_path / "runs").mkdir()
    text = EDF_OF_AN_IMAGE.replace("${PWD}:${PWD}", "${PWD}/runs:${PWD}/runs").replace(
        "writable", 'workdir = "${PWD}"\nwritable'
    )
    (tmp_path / "base.toml").write_text(text)
    assert "the working folder is not mounted" in submit("run_dir=runs/one").stderr


def test_submit_configuration_may_lie_in_a_folder_that_is_not_mounted(slurm_command, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/shared.yaml").write_text(SFT)
    (tmp_path / "home/sft.yaml").write_text("extends: shared.yaml\nseed: 9\n")
    (tmp_path / "runs").mkdir()
    text = EDF_OF_AN_IMAGE.replace("${PWD}:${PWD}", "${PWD}/runs:${PWD}/runs")
    (tmp_path / "base.toml").write_text(text)
    words = ("submit", "sft", "home/sft.yaml", "--environment=./post-training.toml")
    done = slurm_command(*words, "run_dir=runs/one")
    assert done.returncode == 0, done.stderr
    frozen = (tmp_path / "runs/one/slurm/config.yaml").read_text()
    assert "seed: 9\n" in frozen
    assert "max_steps: 4\n" in frozen
    assert str(tmp_path / "home") not in (tmp_path / "runs/one/slurm/job.sh").read_text()


def test_submit_dev_copies_the_sources_and_mounts_the_copy(submit, tmp_path):
    source = tmp_path / "checkout/src/post_training"
    source.mkdir(parents=True)
    (source / "x.py").write_text("before")
    assert submit("--dev=checkout").returncode == 0
    (source / "x.py").write_text("after")
    folder = tmp_path / "run/slurm"
    assert (folder / "dev/src/post_training/x.py").read_text() == "before"
    assert set(json.loads((folder / "dev.json").read_text())) == {"commit", "diff", "untracked"}
    edf = load_edf(folder / "environment.toml", {"PWD": str(tmp_path)}, tmp_path)
    targets = {str(mount.target): mount.source for mount in edf.mounts}
    assert targets["/run/post-training/dev"] == folder / "dev"
    assert targets["/run/post-training/dev.json"] == folder / "dev.json"


@pytest.mark.parametrize("place", ["environment", "configuration", "source"])
def test_submit_secret_anywhere_is_refused_and_nothing_is_written(submit, tmp_path, place):
    token = "ghp_" + 36 * "a"
    words, edf = [], (tmp_path / "base.toml").read_text()
    if place == "environment":
        (tmp_path / "base.toml").write_text(f'{edf}NCCL_X = "{token}"\n')
    elif place == "configuration":
        words = [f"logging.wandb_project={token}"]
    else:
        source = tmp_path / "checkout/src/post_training"
        source.mkdir(parents=True)
        (source / "x.py").write_text(f'KEY = "{token}"\n')
        words = ["--dev=checkout"]
    for more in ([], ["--dry-run"]):
        done = submit(*words, *more)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "holds a secret (GitHub token)" in done.stderr
        assert token not in done.stderr
    assert not (tmp_path / "run").exists()


def test_submit_chain_is_held_until_all_of_it_is_queued(submit, tmp_path):
    done = submit("--chain=3", "--site=laptop")
    assert (done.returncode, done.stdout) == (0, "77\n"), done.stderr
    script = tmp_path / "run/slurm/job.sh"
    assert (tmp_path / "bin/sbatch-77").read_text() == f"--hold {script}\n"
    for job_id in (78, 79):
        words = f"--dependency=afterany:{job_id - 1} --kill-on-invalid-dep=yes {script}\n"
        assert (tmp_path / f"bin/sbatch-{job_id}").read_text() == words
    assert (tmp_path / "run/slurm/chain").read_text() == "77\n78\n79\n"
    assert (tmp_path / "bin/scontrol-words").read_text() == "release 77\n"
    assert "#SBATCH --no-requeue\n" in script.read_text()
    again = submit(queue="79 PENDING Dependency\n")
    assert "job 79 is already in the queue" in again.stderr


def test_submit_chain_refused_in_its_middle_leaves_nothing_queued(submit, tmp_path):
    (tmp_path / "refuse").write_text("78")
    assert submit("--chain=3").returncode == 1
    assert (tmp_path / "bin/cancelled").read_text() == "77\n"
    assert not (tmp_path / "run/slurm/submission.json").exists()


def test_submit_chain_of_a_stage_that_begins_over_is_refused(slurm_command, tmp_path):
    (tmp_path / "mix.yaml").write_text("{data: {datasets: [{path: x.jsonl}]}, run_dir: run}")
    command = ("submit", "mix", "mix.yaml", "--environment=./post-training.toml", "--chain=2")
    done = slurm_command(*command)
    assert done.returncode == 2
    assert "--chain: mix begins over each time it is stopped" in done.stderr


def test_submit_two_at_once_one_is_refused(submit, cli, tmp_path):
    """The first one's sbatch takes until the second has been refused."""
    sbatch = tmp_path / "bin/sbatch"
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    sbatch.write_text(f'#!/bin/bash\n: >"{gate}"\nread -r <"{gate}"\necho 77\n')
    command = ["submit", "sft", "sft.yaml", "--environment=./post-training.toml"]
    first = subprocess.Popen(
        [cli, *command], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    gate.read_text()  # It is in sbatch now.
    done = submit()
    gate.write_text("go on\n")
    assert first.communicate()[0] == "77\n"
    assert (done.returncode, "it is being submitted just now" in done.stderr) == (2, True)
