"""`post-training init`: configurations that are right as they are written."""

import json
import os
import pty
import subprocess

import pytest

from post_training.cli.init import KINDS, write_first_config
from post_training.config.load import load_config
from post_training.slurm.pipeline import load_pipeline
from post_training.stages.registry import find_stage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["model", "my model: x", "null", '"q" #1', "ünï"])
def test_init_writes_a_config_that_loads_with_any_path(kind, path, tmp_path):
    model, data, target = tmp_path / path, tmp_path / path / "rows.jsonl", tmp_path / "cfg.yaml"
    missing = write_first_config(kind, target, model=model, data=data, run_dir=tmp_path / "run")
    assert missing == [str(model), str(data)]
    if kind == "pipeline":
        [pipeline] = load_pipeline(target)
        assert pipeline.config.run_dir == tmp_path / "run"
        return
    config = load_config(find_stage(kind).load_config_class(), target)
    assert (config.model.path, config.run_dir) == (model, tmp_path / "run")
    assert config.data.datasets[0].path == data


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"chat_template.jinja": "x"}, "model"),
        ({"tokenizer_config.json": json.dumps({"chat_template": "x"})}, "model"),
        ({"tokenizer_config.json": "{}"}, "chatml"),
        ({"config.json": "{}"}, "chatml"),
    ],
)
def test_init_takes_the_template_of_a_model_that_has_one(files, template, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    target = tmp_path / "sft.yaml"
    write_first_config("sft", target, model=model, data=tmp_path, run_dir=tmp_path / "run")
    assert f"chat_template: {template}\n" in target.read_text()


def test_init_asks_three_questions_on_a_terminal(cli, tmp_path):
    ours, theirs = pty.openpty()
    os.write(ours, b"m\nrows.jsonl\n\n")
    done = subprocess.run(
        [cli, "init", "sft"], stdin=theirs, capture_output=True, text=True, cwd=tmp_path
    )
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, done.stdout) == (0, "sft.yaml\n")
    assert done.stderr.startswith(
        "the model's folder: the rows (a file): the folder of the run [runs/sft]: note: "
    )
    assert "run_dir: runs/sft " in (tmp_path / "sft.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("init stf", "error: no first configuration 'stf', did you mean 'sft'?"),
        ("init sft", "error: --model: not given: the model's folder"),
        ("init sft -o there", "error: there: is there already"),
        ("init sft --model m --data there", "error: there: unknown kind of file ''; known: .jsonl"),
        ("init sft -o no/such.yaml", "error: no: no such folder"),
    ],
)
def test_init_that_cannot_be_done_is_told_and_writes_nothing(cli, words, told, tmp_path):
    (tmp_path / "there").write_text("mine")
    done = subprocess.run(
        [cli, *words.split()], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(told)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
