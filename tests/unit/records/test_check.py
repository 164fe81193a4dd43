"""Every edit of a run is seen by every command that shows, compares, states or repeats it."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest

from post_training.cli.show import show_diffs, show_lineage, show_run, verify_artifact
from post_training.core.errors import PostTrainingError
from post_training.records.check import check_artifact, check_run
from post_training.records.export import export_run
from post_training.records.run_record import read_record, record_faults, seal
from post_training.reproduce.plan import Options, make_plans


def rewrite(path, change, *, reseal=False):
    """Change a record as a hand would; with a new seal, as somebody would who knows the code."""
    record = json.loads(path.read_text())
    change(record)
    if reseal:
        sealed = record.get("made_by", record)
        sealed["seal"] = seal(sealed)
    path.write_text(json.dumps(record))


def edit_weights(run):
    path = run / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit_line(name):
    def edit(run):
        path = run / name
        path.write_text(path.read_text().replace('"loss": 2.0', '"loss": 0.001'))

    return edit


def edit_record(change, *, reseal=False):
    return lambda run: rewrite(run / "run.json", change, reseal=reseal)


def edit_artifact(change, *, reseal=False):
    return lambda run: rewrite(run / "model/artifact.json", change, reseal=reseal)


OF_THE_RECORD = "was changed by hand (its seal is of something else)"
NO_SEAL = "was changed by hand (its seal is gone)"
IDENTITY = "identity is not that of its recipe, topology, inputs and image"
# Name: the edit, and what is said of the run. Those of the run's own files are no artifact's.
EDITS = {
    "loss": (edit_record(lambda record: record["metrics"].update(loss=0.01)), OF_THE_RECORD),
    "loss, seal deleted": (
        edit_record(lambda record: (record["metrics"].update(loss=0.01), record.pop("seal"))),
        NO_SEAL,
    ),
    "image, resealed": (
        edit_record(
            lambda record: record["image"].update(oci_digest="sha256:" + 64 * "a"), reseal=True
        ),
        IDENTITY,
    ),
    "input, resealed": (
        edit_record(
            lambda record: record["inputs"]["data.path"].update(fingerprint=64 * "a"), reseal=True
        ),
        IDENTITY,
    ),
    "command, resealed": (
        edit_record(lambda record: record.update(command=["entrypoint"]), reseal=True),
        "command: not the same in made_by and in run.json",
    ),
    "weights": (edit_weights, "model.safetensors: changed (sha256 is "),
    "model's configuration": (
        lambda run: (run / "model/config.json").write_text("[]"),
        "config.json: changed (sha256 is ",
    ),
    "made_by": (
        edit_artifact(lambda artifact: artifact["made_by"].update(stage="dpo")),
        f"made_by: {OF_THE_RECORD}",
    ),
    "made_by, resealed": (
        edit_artifact(lambda artifact: artifact["made_by"].update(working_dir="/"), reseal=True),
        "working_dir: not the same in made_by and in run.json",
    ),
    "weights gone": (
        lambda run: (run / "model/model.safetensors").unlink(),
        "model.safetensors: gone",
    ),
    "file added": (
        lambda run: (run / "model/extra.py").write_text("x"),
        "extra.py: not part of the artifact",
    ),
}
OF_THE_RUN_ALONE = {
    "steps": (edit_line("steps.jsonl"), "steps.jsonl: changed"),
    "metrics": (edit_line("metrics.jsonl"), "metrics.jsonl: changed"),
    "configuration": (
        lambda run: (run / "config.yaml").write_text("seed: 2\n"),
        "config.yaml: changed",
    ),
    "outputs, resealed": (
        edit_record(
            lambda record: record["outputs"]["files"].update({"model/model.safetensors": 64 * "a"}),
            reseal=True,
        ),
        "fingerprint of model is not that of its files",
    ),
}


@pytest.mark.parametrize("name", [*EDITS, *OF_THE_RUN_ALONE])
def test_edit_is_seen_by_every_command(finished_run, tmp_path, capsys, name):
    edit, fault = (EDITS | OF_THE_RUN_ALONE)[name]
    run, other = finished_run("one"), finished_run("two")
    assert check_run(run).faults == check_artifact(run / "model").faults == []
    edit(run)

    assert show_run(run, "finished", as_json=False, verify=True) == 1
    assert fault in capsys.readouterr().out
    assert show_run(run, "finished", as_json=False) == 0
    assert fault in capsys.readouterr().out

    for pair in ((run, other), (other, run)):
        assert show_diffs(pair) == 4
        out = capsys.readouterr().out
        assert fault in out
        assert "identical" not in out

    export_run(run, tmp_path / "run.zip")
    assert fault in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        assert "provenance.intoto.json" not in archive.namelist()

    [plan] = make_plans(run, Options(store=tmp_path / "store"))
    assert fault in "\n".join(plan.missing)

    if name in EDITS:
        for command in (verify_artifact, lambda folder: show_lineage(folder, as_json=False)):
            with pytest.raises(PostTrainingError) as told:
                command(run / "model")
            assert fault in str(told.value)


def test_check_says_what_was_read_and_what_is_gone(finished_run, capsys):
    run = finished_run("one")
    assert check_run(run).told == "the record, 5 files by their bytes"
    glance = check_run(run, most_bytes=0)
    assert glance.told == "the record, 0 files by their bytes (5 not read)"
    shutil.rmtree(run / "model")
    gone = check_run(run)
    assert (gone.faults, len(gone.gone)) == ([], 2)
    assert gone.remarks == [
        "gone: model/config.json and 1 more; the record's sha256 stands for what was there"
    ]
    show_run(run, "finished", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "checked      the record, 3 files by their bytes (2 gone)" in lines


def test_show_and_diff_of_what_one_may_not_read_are_one_clear_line(finished_run, tmp_path):
    run, other = finished_run("one"), finished_run("two")
    (run / "model/model.safetensors").chmod(0)
    (other / "run.json").chmod(0)
    tmp_path.chmod(0o755)
    script = (
        "import os, sys\n"
        "os.getuid() or os.setuid(65534)\n"
        "from pathlib import Path\n"
        "from post_training.core.errors import report\n"
        "from post_training.cli.show import show_diffs\n"
        "from post_training.cli.show import show_run\n"
        "run, other = map(Path, sys.argv[1:])\n"
        "show_run(run, 'finished', as_json=False)\n"
        "for command in (lambda: show_run(other, 'finished', as_json=False),\n"
        "                lambda: show_diffs([run, other]), lambda: show_diffs([run, run])):\n"
        "    try: command()\n"
        "    except OSError as error: print(report(error))\n"
    )
    command = [sys.executable, "-c", script, run.name, other.name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checked      the record, 4 files by their bytes (1 not read)" in done.stdout
    assert done.stderr.splitlines() == [
        "error: two/run.json: permission denied",
        "error: two/run.json: permission denied",
        "error: one/model/model.safetensors: permission denied",
    ]


def test_check_of_a_run_that_was_moved_finds_nothing(finished_run, tmp_path):
    run = finished_run("one")
    shutil.move(run, tmp_path / "elsewhere")
    assert check_run(tmp_path / "elsewhere").faults == []
    assert check_artifact(tmp_path / "elsewhere/model").faults == []


def test_check_of_an_artifact_whose_run_lost_its_id_finds_the_fault(finished_run):
    run = finished_run("one")
    rewrite(run / "run.json", lambda record: record.pop("run_id"))
    assert check_artifact(run / "model").faults == [f"{run / 'run.json'}: {OF_THE_RECORD}"]


def test_check_of_an_artifact_deep_in_its_run_looks_at_the_runs_record(finished_run):
    run = finished_run("one")
    deep = run / "merged/step-4/model"
    deep.parent.mkdir(parents=True)
    (run / "model").rename(deep)
    assert check_artifact(deep).faults == []
    rewrite(run / "run.json", lambda record: record["metrics"].update(loss=0.01))
    assert check_artifact(deep).faults == [f"{run / 'run.json'}: {OF_THE_RECORD}"]


def test_edited_run_is_not_continued_and_sealed_for_it(finished_run):
    run = finished_run("one")
    rewrite(run / "run.json", lambda record: record.update(status="interrupted"))
    before = (run / "run.json").read_bytes()
    with pytest.raises(PostTrainingError, match=r"was changed by hand"):
        finished_run("one")
    assert (run / "run.json").read_bytes() == before


def test_reproduce_of_an_edited_run_runs_nothing_and_of_a_sound_one_notes_what_is_gone(
    finished_run, tmp_path
):
    run = finished_run("one")
    (run / "steps.jsonl").unlink()
    [plan] = make_plans(run, Options(store=tmp_path / "store"))
    assert any(line.startswith("gone: steps.jsonl; ") for line in plan.notes)
    assert not any("not what the run left" in line for line in plan.missing)
    assert record_faults(read_record(run)) == []
