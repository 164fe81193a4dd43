"""A model is taken from a cache of the hub's client, and named by its repository and commit."""

import hashlib
import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from post_training.config.model import Role, settings_by_role
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import fingerprint
from post_training.models.config import ModelConfig, fetch_hint
from post_training.models.hub import fetch_model
from post_training.records.artifact import origin_of
from post_training.records.check import check_artifact

COMMIT = "0123456789" * 4
WEIGHTS = b"weights"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An HF_HOME with org/name at COMMIT, its main branch: files are links to blobs."""
    folder = tmp_path / "hf/hub/models--org--name"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "modeling_name.py": b"x"}
    for name, data in files.items():
        digest = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
        blob = digest(data).hexdigest()
        (folder / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return tmp_path / "hf"


def snapshot_of(cache: Path) -> Path:
    return cache / "hub/models--org--name/snapshots" / COMMIT


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_model_of_a_cache_is_taken_without_the_network(
    revision: str | None, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    (snapshot_of(cache) / "onnx").mkdir()
    fetched = fetch_model("org/name", revision, tmp_path / "hub", cache)
    assert fetched.settings() == (
        f"model:\n  hub: org/name\n  revision: {COMMIT}\n  hub_dir: {tmp_path / 'hub'}"
    )
    assert sorted(path.name for path in fetched.folder.iterdir()) == [
        *("artifact.json", "config.json", "model.safetensors"),
    ]
    assert "not fetched: modeling_name.py, onnx/\n" in capsys.readouterr().err
    # No second copy on the disk; and it stays when the cache is cleaned.
    weights = fetched.folder / "model.safetensors"
    assert os.path.samefile(weights, snapshot_of(cache) / "model.safetensors")
    assert not weights.is_symlink()
    assert check_artifact(fetched.folder).faults == []
    origin = origin_of(fetched.folder, fingerprint(fetched.folder))
    assert (origin["stage"], origin["run_id"]) == ("fetch", f"fetched org/name {COMMIT}")
    assert fetch_model("org/name", revision, tmp_path / "hub", cache) == fetched


def test_file_of_a_cache_that_others_may_not_read_stays_such(cache: Path, tmp_path: Path):
    blob = (snapshot_of(cache) / "model.safetensors").resolve()
    blob.chmod(0o600)
    folder = fetch_model("org/name", None, tmp_path / "hub", cache).folder
    assert stat.S_IMODE(blob.stat().st_mode) == 0o600
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_model_that_was_changed_since_it_was_fetched_is_noticed(cache: Path, tmp_path: Path):
    folder = fetch_model("org/name", None, tmp_path / "hub", cache).folder
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"hidden_size": 1}')
    with pytest.raises(UsageError, match="was changed after run fetched org/name"):
        origin_of(folder, fingerprint(folder))


def test_model_of_a_cache_that_is_damaged_or_elsewhere_is_refused(cache: Path, tmp_path: Path):
    hub_dir = tmp_path / "hub"
    with pytest.raises(UsageError, match="org/other is not in this cache"):
        fetch_model("org/other", None, hub_dir, cache)
    with pytest.raises(UsageError, match="no revision v2 in this cache"):
        fetch_model("org/name", "v2", hub_dir, cache)
    with pytest.raises(UsageError, match="must be OWNER/NAME"):
        fetch_model("name", None, hub_dir, cache)
    blob = (snapshot_of(cache) / "model.safetensors").resolve()
    blob.write_bytes(b"damaged")
    with pytest.raises(PostTrainingError, match="its bytes are not those of its name"):
        fetch_model("org/name", None, hub_dir, cache)
    blob.unlink()
    with pytest.raises(UsageError, match="is not whole in this cache"):
        fetch_model("org/name", None, hub_dir, cache)
    assert not hub_dir.exists() or list(hub_dir.iterdir()) == []


def test_fetched_model_of_settings_is_the_folder_and_its_name_no_identity():
    named = {"hub": "org/name", "revision": COMMIT, "hub_dir": "hub"}
    by_hub = ModelConfig.model_validate(named)
    path = Path("hub/models--org--name") / COMMIT
    by_path = ModelConfig(path=path)
    assert by_hub.path == path
    roles = settings_by_role(by_hub)
    assert roles[Role.INPUT] == settings_by_role(by_path)[Role.INPUT]
    assert roles[Role.RECIPE] == settings_by_role(by_path)[Role.RECIPE]
    assert "hub" not in settings_by_role(by_path)[Role.PLACEMENT]
    # What was resolved once, with both, is read again.
    assert ModelConfig.model_validate_json(by_hub.model_dump_json()) == by_hub
    assert fetch_hint(path) == (
        "where there is a network, run: post-training model fetch org/name "
        f"--revision {COMMIT} --hub-dir hub"
    )
    assert fetch_hint(Path("models/name")) is None


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"hub": "org/name"}, "set revision, hub_dir too"),
        ({"hub": "org/name", "revision": "main", "hub_dir": "hub"}, "revision"),
        (
            {"hub": "org/name", "revision": COMMIT, "hub_dir": "hub", "path": "x"},
            "set either path or hub .got x and org/name",
        ),
        ({}, "path"),
    ],
)
def test_model_that_is_half_named_is_refused(given: dict[str, str], problem: str):
    with pytest.raises(ValidationError, match=problem):
        ModelConfig.model_validate(given)
