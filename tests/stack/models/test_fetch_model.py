"""Models are fetched by the hub's own client, from a server on this machine, and then trained."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.hub_server import COMMIT, Hub, client_environment, serve_hub
from helpers.sft_runs import changed
from helpers.stage_process import start_entrypoint
from post_training.core.hashing import fingerprint
from post_training.records.artifact import read_artifact

WEIGHTS = "model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fetch(hub: Hub | None, hub_dir: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "post_training.cli", "model", "fetch", "owner/name"]
    return subprocess.run(
        [*command, "--hub-dir", str(hub_dir), *options],
        env=client_environment(hub, hub_dir.parent / "home"),
        capture_output=True,
        text=True,
    )


def test_model_is_fetched_once_and_trains_as_one_of_a_path(
    model: Path, config: dict[str, Any], tmp_path: Path
):
    hub_dir = tmp_path / "hub"
    model = Path(shutil.copytree(model, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    files = files_of(model) | {"pytorch_model.bin": b"pickle", "original/x.pth": b"pickle"}
    with serve_hub("model", files, (WEIGHTS,)) as hub:
        done = fetch(hub, hub_dir)
        assert done.returncode == 0, done.stderr
        assert done.stdout == (
            f"model:\n  hub: owner/name\n  revision: {COMMIT}\n  hub_dir: {hub_dir}\n"
        )
        assert "not fetched: original/, pytorch_model.bin\n" in done.stderr
        assert "licence, as its card states it: mit\n" in done.stderr
        # What is there is not asked for again.
        hub.requests.clear()
        assert fetch(hub, hub_dir, "--revision", COMMIT).stdout == done.stdout
        assert hub.requests == []
    folder = hub_dir / "models--owner--name" / COMMIT
    assert [path.name for path in folder.parent.iterdir()] == [COMMIT]
    assert read_artifact(folder)["made_by"]["recipe"] == {"hub": "owner/name", "revision": COMMIT}
    assert fingerprint(folder) == fingerprint(model)

    # From here on nobody answers, and a run needs nobody.
    records = {}
    named = {"hub": "owner/name", "revision": COMMIT, "hub_dir": str(hub_dir)}
    for name, told in {"by-hub": named, "by-path": {"path": str(model)}}.items():
        settings = changed(config, **{"training.max_steps": 1})
        settings["model"] = {key: v for key, v in settings["model"].items() if key != "path"} | told
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
        process = start_entrypoint(
            ["sft", f"{name}.yaml", "--unpinned", f"run_dir={name}"],
            tmp_path / "log",
            folder=tmp_path,
        )
        process.join(120)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
        records[name] = json.loads((tmp_path / name / "run.json").read_text())
    by_hub, by_path = records["by-hub"], records["by-path"]
    assert by_hub["identity"] == by_path["identity"]
    assert by_hub["outputs"]["files"] == by_path["outputs"]["files"]
    made_by = by_hub["inputs"]["model.path"]["made_by"]
    assert made_by["run_id"] == f"fetched owner/name {COMMIT}"
    assert (by_hub["licences"], by_path.get("licences")) == ({"model.path": "mit"}, None)


@pytest.mark.parametrize(
    ("changes", "options", "problem"),
    [
        ({WEIGHTS: None, "pytorch_model.bin": b"x"}, [], "its weights are pickles alone (pytorch_"),
        ({WEIGHTS: None}, [], "no model: it has no *.safetensors"),
        ({"config.json": None}, [], "no model for transformers: it has no config.json"),
        (
            {"config.json": b'{"auto_map": {"AutoConfig": "x.X"}}', "x.py": b""},
            [],
            "it needs code of its own, and none is ever run: config.json has an auto_map",
        ),
        ({}, ["--revision", "v9"], "the hub has no such revision of it"),
    ],
)
def test_model_that_cannot_be_used_is_refused_and_leaves_nothing(
    changes: dict[str, bytes | None], options: list[str], problem: str, tmp_path: Path
):
    files: dict[str, Any] = {"config.json": b"{}", WEIGHTS: b"weights"} | changes
    given = {name: data for name, data in files.items() if data is not None}
    with serve_hub("model", given) as hub:
        done = fetch(hub, tmp_path / "hub", *options)
        assert done.returncode == 2, done.stderr
        assert f"error: hub: owner/name: {problem}" in done.stderr
        assert not (tmp_path / "hub").exists() or list((tmp_path / "hub").iterdir()) == []
        asked = [line for line in hub.requests if WEIGHTS in line]
        assert asked == []  # not even of one whose settings alone tell that it is refused


def test_model_whose_bytes_are_not_those_of_the_hub_is_refused(tmp_path: Path):
    files = {"config.json": b"{}", WEIGHTS: b"weights"}
    with serve_hub("model", files, (WEIGHTS,)) as hub:
        hub.sent[WEIGHTS] = b"WEIGHTS"
        done = fetch(hub, tmp_path / "hub")
    assert done.returncode == 1
    assert f"error: hub: owner/name: {WEIGHTS}: its sha256 is not the one" in done.stderr
    assert list((tmp_path / "hub").iterdir()) == []


def test_model_that_is_cut_short_or_of_no_hub_fails_and_leaves_nothing(tmp_path: Path):
    with serve_hub("model", {"config.json": b"{}", WEIGHTS: b"weights"}) as hub:
        hub.cut = WEIGHTS
        cut = fetch(hub, tmp_path / "hub")
    for done in (cut, fetch(None, tmp_path / "hub")):
        assert done.returncode == 1
        assert "error: hub: owner/name: the download failed: " in done.stderr
        assert list((tmp_path / "hub").iterdir()) == []
