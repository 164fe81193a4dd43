"""Axolotl itself under `entrypoint exec`: the configuration of the CSCS tutorial trains two steps,
and again with the same bytes.

Axolotl is in an environment of its own, on the image's Python and torch, as docs/from/axolotl.md
says. 235 packages are downloaded (0.7 GB); about ten minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.sums import write_sums
from post_training.records.run_record import read_record

pytestmark = [pytest.mark.long, pytest.mark.image]
# Axolotl 0.19.0 and what it asks for, but for torch, which is the image's, and what needs a GPU.
PACKAGES = Path(__file__).with_name("axolotl-0.19.0.txt")
TUTORIAL = Path(__file__).parents[1] / "unit/importers/files/axolotl.yaml"
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
command: [axolotl/bin/python, -m, axolotl.cli.train, train.yaml]
inputs:
  - {name: axolotl, path: axolotl}
  - {name: train.yaml, path: train.yaml}
  - {name: base, path: init/model}
  - {name: conversations.jsonl, path: conversations.jsonl}
  - {name: pretrain.jsonl, path: pretrain.jsonl}
outputs: [{name: model, path: out}]
unstable: ["*/trainer_state.json", "*.log"]  # tokens a second, and times
environment: {AXOLOTL_DO_NOT_TRACK: "1"}
"""
MAKE_ENVIRONMENT = """
python -m venv --copies axolotl
python -c "import site; print(site.getsitepackages()[0])" >image.pth
mv image.pth axolotl/lib/python3*/site-packages
axolotl/bin/python -m pip install --quiet --no-index --no-deps /wheels/*.whl
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--use-pep517"]
    subprocess.run([*command, "-r", PACKAGES, "-w", folder], check=True)
    return folder


def test_axolotl_trains_the_tutorial_under_a_record(
    wheels: Path, image_edf: Path, post_training, tmp_path: Path
):
    def inside(*words: str) -> None:
        mount = f"{wheels}:/wheels:ro"
        done = post_training("edf", "run", "--mount", mount, image_edf, "--", *words)
        assert done.returncode == 0, done.stdout + done.stderr

    write_sums(tmp_path)
    write_tutorial(tmp_path)
    inside("entrypoint", "init-model", "init.yaml")
    inside("sh", "-ec", MAKE_ENVIRONMENT)
    inside("entrypoint", "exec", "run.yaml")
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished"
    [state] = (tmp_path / "run/work").rglob("checkpoint-2/trainer_state.json")
    assert json.loads(state.read_text())["global_step"] == 2
    assert (tmp_path / "run/model/model.safetensors").exists()
    done = post_training("reproduce", tmp_path / "run")
    assert (done.returncode, done.stdout.split(":")[0]) == (0, "identical"), done.stdout


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
