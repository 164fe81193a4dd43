"""containers/axolotl: Axolotl in an image of its own over the cpu image. Under `entrypoint exec` it
trains two steps of the CSCS tutorial's configuration, and again with the same bytes. All forms of
the image are one.

The recipe's packages are downloaded (0.9 GB); five minutes. containers/axolotl-gh200 likewise,
where arm64 runs or is emulated: half an hour, with gh200 itself.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from helpers.real_images import NEEDS_ARM64, REPOSITORY, pushed_image
from helpers.sums import write_sums
from post_training.images.own_base import lock_own_base
from post_training.images.recipe import load_recipe
from post_training.images.store import ImageStore, default_store
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]
TUTORIAL = REPOSITORY / "tests/unit/importers/files/axolotl.yaml"
# Plugins, kernels and DeepSpeed of the tutorial are for GPUs; the rest makes it short.
ON_A_CPU = {
    "plugins": None,
    "flash_attention": False,
    "flash_attn_rms_norm": None,
    "flash_attn_fuse_qkv": None,
    "deepspeed": None,
    "base_model": "base",
    "output_dir": "out",
    "sequence_len": 128,
    "micro_batch_size": 1,
    "dataset_processes": 1,
    "max_steps": 2,
    "wandb_project": None,
    "wandb_name": None,
    "bf16": False,
    "optim_args": None,
    "chat_template": "chatml",  # the model's own has none
    "seed": 42,  # without one, each run trains on other rows
}
RUN = """
run_dir: run
command: [/opt/axolotl/bin/python, -m, axolotl.cli.train, train.yaml]
inputs:
  - {name: train.yaml, path: train.yaml}
  - {name: base, path: init/model}
  - {name: conversations.jsonl, path: conversations.jsonl}
  - {name: pretrain.jsonl, path: pretrain.jsonl}
outputs: [{name: model, path: out}]
unstable: ["*/trainer_state.json", "*.log"]  # tokens a second, and times
"""


@pytest.fixture(params=["axolotl", pytest.param("axolotl-gh200", marks=NEEDS_ARM64)])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def axolotl_edf(recipe: str, post_training, tmp_path: Path, monkeypatch) -> Path:
    """The EDF of the image that the recipe gives over the image of these sources."""
    checkout = tmp_path / "checkout"
    for name in (f"containers/{recipe}", "containers/steps", "edf"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    loaded = load_recipe(recipe, checkout)
    store, base = pushed_image(loaded.settings.base)
    lock_own_base(loaded, base["oci_digest"], store)
    monkeypatch.setenv("EDF_PATH", str(tmp_path / "edf"))
    for verb, *options in (["build"], ["push-sqsh", "--site", "laptop"]):
        done = post_training("image", verb, recipe, *options, "--repository", checkout)
        assert done.returncode == 0, done.stderr
    return checkout / f"edf/post-training-{recipe}.toml"


def test_axolotl_trains_the_tutorial_under_a_record(recipe, axolotl_edf, post_training, tmp_path):
    def inside(*words: str) -> None:
        done = post_training("edf", "run", axolotl_edf, "--", *words)
        assert done.returncode == 0, done.stdout + done.stderr

    write_sums(tmp_path)
    write_tutorial(tmp_path)
    inside("entrypoint", "init-model", "init.yaml")
    inside("entrypoint", "exec", "run.yaml")
    record = read_record(tmp_path / "run")
    assert (record["status"], record["image"]["name"]) == ("finished", recipe)
    pushed = ImageStore(default_store()).record(record["image"]["sqsh_sha256"])
    assert pushed["packages"]["/opt/axolotl"]["axolotl"] == "0.19.0"
    [state] = (tmp_path / "run/work").rglob("checkpoint-2/trainer_state.json")
    assert json.loads(state.read_text())["global_step"] == 2
    assert (tmp_path / "run/model/model.safetensors").exists()
    done = post_training("reproduce", tmp_path / "run")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "identical"), done.stdout
    done = post_training("image", "passport", record["image"]["oci_digest"])
    assert done.returncode == 0, done.stdout + done.stderr


def write_tutorial(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
    chats = [
        {
            "conversations": [
                {"from": "user", "value": row["question"]},
                {"from": "assistant", "value": row["answer"]},
            ]
        }
        for row in rows
    ]
    texts = [{"text": f"{row['question']} {row['answer']}"} for row in rows]
    for name, each in (("conversations", chats), ("pretrain", texts)):
        text = "".join(json.dumps(row) + "\n" for row in each)
        (folder / f"{name}.jsonl").write_text(text)
    given = yaml.safe_load(TUTORIAL.read_text()) | ON_A_CPU
    (folder / "train.yaml").write_text(yaml.safe_dump(given))
    (folder / "run.yaml").write_text(RUN)
