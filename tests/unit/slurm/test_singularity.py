"""Singularity's words from an EDF's; bash runs the rendered script, with a stand-in for it."""

import json
import subprocess
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.store import ImageStore
from post_training.slurm.singularity import bind, render_script, shell_word
from post_training.slurm.site import Launcher

RECORD = {
    "name": "rocm", "version": "1.2.3", "input_hash": "1" * 64, "oci_digest": "sha256:" + "2" * 64,
    "sqsh_sha256": "3" * 64, "sif_sha256": "6" * 64,
}  # fmt: skip
LAUNCHER = Launcher(kind="singularity", options=("--rocm",), gpu_variable="ROCR_VISIBLE_DEVICES")
SINGULARITY = """#!/usr/bin/env python3
import json, os, sys
with open(os.environ["SAID"], "w") as file:
    json.dump({"words": sys.argv[1:], "env": dict(os.environ)}, file)
"""


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        ("/a:/a", "--bind=/a"),
        ("/a", "--bind=/a"),
        ("/a:/b", "--bind=/a:/b"),
        ("/a:/a:ro", "--bind=/a:/a:ro"),
    ],
)
def test_bind_of_a_mount(mount, expected):
    assert bind(mount) == expected


def test_bind_of_a_flag_without_a_counterpart_is_refused():
    with pytest.raises(UsageError, match="no flag 'sqsh'"):
        bind("/x.sqsh:/b:sqsh")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", "plain text"),
        ('it\'s $HOME \\ `id` "q"', 'it\'s $HOME \\ `id` "q"'),
        ("${WHO}/x", "me/x"),
        ("${NOT_SET:-a b}", "a b"),
        ("$${WHO} ${WHO}", "${WHO} me"),
        ("$$WHO \\ ` ${WHO}", "$WHO \\ ` me"),
        ("$$WHO $$5", "$WHO $$5"),
    ],
)
def test_shell_word_expands_what_an_edf_expands_and_nothing_else(text, expected):
    script = f"printf %s {shell_word(text)}"
    done = subprocess.run(["bash", "-c", script], env={"WHO": "me"}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (expected, "")


def test_rendered_script_starts_singularity_with_the_edfs_settings(tmp_path):
    (tmp_path / "here.toml").write_text(
        'workdir = "${PWD}"\nmounts = ["/a:/a", "/data/${WHO}:/d:ro"]\n'
        '[env]\nPOST_TRAINING_SITE = "here"\nNAMES = "h0,h1,h2"\nHOME_OF = "it\'s ${WHO}\'s"\n'
    )
    (tmp_path / "singularity").write_text(SINGULARITY)
    (tmp_path / "singularity").chmod(0o755)
    script = render_script("here", LAUNCHER, tmp_path / "here.toml", RECORD, ImageStore(Path("/s")))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WHO": "me", "SAID": str(tmp_path / "said")}
    command = ["bash", "-c", script, "run", "entrypoint", "sft", "my cfg.yaml"]
    step = {"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
    subprocess.run(command, env={**env, **step}, cwd=tmp_path, check=True)
    said = json.loads((tmp_path / "said").read_text())
    sif = f"/s/sha256-{'6' * 64}.sif"
    assert said["words"] == [
        "exec", "--rocm", "--bind=/a", "--bind=/data/me:/d:ro", "--bind=/s:/s:ro",
        f"--pwd={tmp_path}", sif, "entrypoint", "sft", "my cfg.yaml",
    ]  # fmt: skip
    inside = {
        name.removeprefix("SINGULARITYENV_"): value
        for name, value in said["env"].items()
        if name.startswith("SINGULARITYENV_")
    }
    assert inside["NAMES"] == "h0,h1,h2"
    assert inside["HOME_OF"] == "it's me's"
    assert inside["POST_TRAINING_IMAGE_PATH"] == sif
    assert inside["POST_TRAINING_IMAGE_SIF_SHA256"] == "6" * 64
    assert said["env"]["ROCR_VISIBLE_DEVICES"] == "3"
    subprocess.run(command, env=env, cwd=tmp_path, check=True)
    assert "ROCR_VISIBLE_DEVICES" not in json.loads((tmp_path / "said").read_text())["env"]
    for tasks in ("1", "1(x4)"):  # alone on its node it sees all
        alone = {**env, "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks}
        subprocess.run(command, env=alone, cwd=tmp_path, check=True)
        assert "ROCR_VISIBLE_DEVICES" not in json.loads((tmp_path / "said").read_text())["env"]


def test_render_script_without_a_sif_is_refused_with_the_command():
    record = {**RECORD, "sif_sha256": None}
    with pytest.raises(UsageError, match=r"has no SIF in the store\nhint: .*push-sif rocm"):
        render_script("lumi", LAUNCHER, Path("x"), record, ImageStore(Path("/s")))


def test_rendered_script_unsets_what_is_empty_and_goes_on_from_the_images_path(tmp_path):
    (tmp_path / "here.toml").write_text(
        '[env]\nPOST_TRAINING_SITE = "here"\nLEFTOVER = ""\nPATH = "${PATH}:/custom/bin"\n'
    )
    (tmp_path / "singularity").write_text(SINGULARITY)
    (tmp_path / "singularity").chmod(0o755)
    record = {**RECORD, "environment": {"PATH": "/opt/bin"}}
    script = render_script("here", LAUNCHER, tmp_path / "here.toml", record, ImageStore(Path("/s")))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SAID": str(tmp_path / "said"), "LEFTOVER": "1"}
    subprocess.run(["bash", "-c", script, "run", "sft"], env=env, cwd=tmp_path, check=True)
    said = json.loads((tmp_path / "said").read_text())
    assert said["words"][-4:] == ["env", "-u", "LEFTOVER", "sft"]
    assert "SINGULARITYENV_LEFTOVER" not in said["env"]
    assert said["env"]["SINGULARITYENV_PATH"] == "/opt/bin:/custom/bin"
