"""A reproduction as a job of a site: the site's hooks, the record's variables, inputs read-only."""

import tomllib
from pathlib import Path

import pytest

from post_training.config.load import load_config, resolved_yaml
from post_training.images.store import ImageStore
from post_training.reproduce.plan import StoredImage
from post_training.reproduce.run_again import (
    HERE,
    _overrides,
    _settings,
    read_surroundings,
    reproduction_edf,
)

REPOSITORY = Path(__file__).parents[3]
IMAGE = {"oci_digest": "sha256:1", "sqsh_sha256": "22", "input_hash": "33"}
RECORD = {
    "mounts": [],
    "environment": {
        "POST_TRAINING_SITE": "clariden",
        "NCCL_NET": "AWS Libfabric",
        "NCCL_DEBUG": "${LEVEL}",
        "SLURM_JOB_ID": "7",
    },
}
from post_training.train.config import SftConfig


@pytest.fixture
def text(tmp_path):
    """The EDF for a run with these surroundings, read again."""
    (tmp_path / "data").mkdir()

    def make(record=RECORD, around=HERE) -> dict:
        image = StoredImage(IMAGE, ImageStore(tmp_path / "images"))
        run_dir, new_dir = tmp_path / "runs/one", tmp_path / "runs/two"
        inputs = {"data": tmp_path / "data"}
        made = reproduction_edf(record, run_dir, new_dir, inputs, (image, image.squashfs), around)
        return tomllib.loads(made)

    return make


def test_reproduction_sees_everything_read_only_but_its_own_place(text, tmp_path):
    (tmp_path / "gone-since").mkdir()
    record = {**RECORD, "mounts": [f"{tmp_path}:{tmp_path}", f"{tmp_path}/gone:/gone:ro"]}
    folders = [tmp_path / "images", tmp_path / "runs/one", tmp_path, tmp_path / "data"]
    assert text(record)["mounts"] == [
        *(f"{folder}:{folder}:ro" for folder in folders),
        f"{tmp_path}/runs:{tmp_path}/runs",
    ]


def test_reproduction_sets_what_was_set_and_not_where_it_ran(text):
    env = text()["env"]
    assert env["NCCL_DEBUG"] == "$${LEVEL}"
    assert "SLURM_JOB_ID" not in env
    assert env["POST_TRAINING_IMAGE_OCI_DIGEST"] == "sha256:1"


def test_reproduction_at_a_site_has_its_hooks_and_folders_and_the_recorded_network(text, tmp_path):
    made = text(around=read_surroundings(RECORD, tmp_path / "runs/one", REPOSITORY))
    hooks = made["annotations"]
    assert hooks["com.hooks.aws_ofi_nccl.enabled"] == "true"
    assert made["env"]["HF_HOME"] == "/dev/shm/${USER}/huggingface"
    # The site's file sets it today; the run was without.
    assert "NCCL_PROTO" not in made["env"]
    assert made["env"]["NCCL_NET"] == "AWS Libfabric"


def test_reproduction_of_a_submitted_run_takes_its_frozen_environment(text, tmp_path):
    folder = tmp_path / "runs/one/slurm"
    folder.mkdir(parents=True)
    (folder / "environment.toml").write_text(
        f'image = "/old.sqsh"\nmounts = ["{tmp_path}:/seen"]\n'
        '[env]\nPOST_TRAINING_IMAGE_PATH = "/old.sqsh"\nXDG_CACHE_HOME = "/tmp/${USER}"\n'
        '[annotations]\n"com.hooks.cxi.enabled" = "false"\n'
    )
    made = text(around=read_surroundings(RECORD, tmp_path / "runs/one", tmp_path / "no-checkout"))
    assert f"{tmp_path}:/seen:ro" in made["mounts"]
    assert made["env"]["XDG_CACHE_HOME"] == "/tmp/${USER}"
    assert made["env"]["POST_TRAINING_IMAGE_PATH"] == made["image"] != "/old.sqsh"
    assert made["annotations"] == {"com.hooks.cxi.enabled": "false"}


def test_settings_of_a_reproduction_make_everything_anew_and_report_to_nobody(tmp_path):
    placement = {
        "data.cache_dir": "cache",
        "data.hub_dir": "hub",
        "checkpointing.inference_checkpoint_path": "inference",
        "logging.report_to": ["wandb"],
    }
    record = {"topology": {"num_threads": 3, "world_size": 2}, "working_dir": "/work"}
    inputs = {"model.path": Path("/models/one")}
    assert _settings({**record, "placement": placement}, tmp_path, inputs) == {
        "run_dir": str(tmp_path),
        "num_processes": 2,
        "num_threads": 3,
        "data.cache_dir": None,
        "data.hub_dir": "/work/hub",
        "checkpointing.inference_checkpoint_path": None,
        "logging.report_to": [],
        "model.path": "/models/one",
    }
    assert _settings({**record, "placement": {}}, tmp_path, {}).keys() == {
        "run_dir", "num_processes", "num_threads"
    }  # fmt: skip


def test_reproduction_of_a_run_with_a_model_of_the_hub_reads_it_where_it_is(tmp_path):
    named = {"hub": "org/name", "revision": 40 * "a", "hub_dir": "hub"}
    config = {
        "model": named,
        "data": {"chat_template": "chatml", "datasets": [{"path": "rows.jsonl"}]},
        "sft": {"max_seq_length": 64},
        "training": {
            "max_steps": 9,
            "effective_batch_size": 8,
            "learning_rate": 1e-5,
            "exit_interval": 3,
        },
        "promote": "store",
    }
    resolved = tmp_path / "config.yaml"
    resolved.write_text(resolved_yaml(SftConfig.model_validate(config)))
    placement = {f"model.{key}": value for key, value in named.items()}
    placement |= {"training.exit_interval": 3, "promote": "store"}
    record = {"working_dir": "/w", "topology": {"world_size": 1, "num_threads": 1}}
    kept = tmp_path / "kept/model"
    settings = _settings({**record, "placement": placement}, tmp_path, {"model.path": kept})
    again = load_config(SftConfig, resolved, _overrides(settings))
    assert (again.model.path, again.model.hub) == (kept, None)
    assert (again.training.exit_interval, again.promote) == (None, None)
