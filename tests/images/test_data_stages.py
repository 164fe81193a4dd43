"""Data stages in the image: however training comes by its rows, the run is identical again."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.image

DATA = """
data:
  chat_template: chatml
  on_error: skip
  datasets:
    - {path: sums.jsonl, subsample_factor: 0.5}
    - {path: chats.jsonl}
sft: {max_seq_length: 64, packing: bfd}
"""
SFT = """
model: {path: init/model}
training:
  {max_steps: 2, effective_batch_size: 2, per_device_train_batch_size: 1, learning_rate: 1e-3}
sft: {max_seq_length: 64, packing: bfd}
"""
TOKENIZE = """
inputs: [lumi.jsonl]
tokenizer: init/model
control_tokens: {user: 3, assistant: 4}
eod: </s>
output_prefix: chat
run_dir: tokenize
"""


@pytest.fixture(scope="module")
def folder(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of three formats, one of them bad."""
    here = tmp_path_factory.mktemp("data")
    shutil.copytree(job / "init", here / "init")
    shutil.copy(job / "sums.jsonl", here)
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    (here / "chats.jsonl").write_text(f"{json.dumps(chat)}\n{{bad\n")
    marked = "<<<|user|>>>{}?<<<|user|>>><<<|assistant|>>>{}.<<<|assistant|>>>"
    rows = [json.dumps({"text": marked.format(a, a * a)}) for a in range(20)]
    (here / "lumi.jsonl").write_text("\n".join(rows))
    (here / "data.yaml").write_text(DATA)
    (here / "sft.yaml").write_text(SFT)
    (here / "prepare.yaml").write_text(
        "extends: [data.yaml]\ntokenizer: init/model\nrun_dir: prepare\n"
    )
    (here / "cached.yaml").write_text("extends: [data.yaml, sft.yaml]\ndata: {cache_dir: cache}\n")
    (here / "tokenize.yaml").write_text(TOKENIZE)
    return here


@pytest.fixture(scope="module")
def runs(folder: Path, image_edf: Path, cli: Path) -> Path:
    """prepare and tokenize, and sft on what each left, and on the data itself through a cache."""
    for words in (
        ["prepare", "prepare.yaml"],
        ["tokenize", "tokenize.yaml"],
        ["sft", "sft.yaml", "data.prepared=prepare/dataset", "run_dir=prepared"],
        ["sft", "sft.yaml", "data.indexed=[tokenize/dataset/chat]", "run_dir=indexed"],
        ["sft", "cached.yaml", "run_dir=cached"],
    ):
        done = subprocess.run(
            [cli, "edf", "run", image_edf, "--", "entrypoint", *words],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    "run",
    [
        "prepare",
        "indexed",
        pytest.param("tokenize", marks=pytest.mark.long),
        pytest.param("prepared", marks=pytest.mark.long),
    ],
)
def test_data_however_it_comes_is_reproduced_identically(run: str, runs: Path, post_training):
    done = post_training("reproduce", runs / run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("identical: ")


def test_data_in_the_cache_trains_as_prepared_data_does(runs: Path):
    weights = [
        (runs / run / "model/model.safetensors").read_bytes() for run in ("cached", "prepared")
    ]
    assert weights[0] == weights[1]


def test_data_reproduction_does_not_read_the_cache(runs: Path, post_training):
    shutil.copytree(runs / "cached", runs / "copy", symlinks=True)
    shutil.rmtree(runs / "cache")
    done = post_training("reproduce", runs / "copy")
    assert done.returncode == 0, done.stderr
    assert not (runs / "copy-reproduced-1/data").is_symlink()
