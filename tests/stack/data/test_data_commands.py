"""`post-training data inspect` and `count` where the training stack is: here, inside the image."""

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed
from helpers.tokenize_runs import document, tokenize, train_model, write_lines
from post_training.cli.inspect import count_config, count_indexed, inspect_config, inspect_indexed
from post_training.core.errors import ConfigError, PostTrainingError, UsageError
from post_training.stages.config import PrepareConfig
from post_training.stages.context import StageContext
from post_training.stages.prepare import run as prepare


@pytest.fixture
def settings(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of sft, in the working directory. JSON is YAML."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sft.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two documents, tokenised beside `spm.model`."""
    monkeypatch.chdir(tmp_path)
    model = train_model(tmp_path / "spm.model")
    lines = [{"text": document("What is 2 + 2?", f"It is {n}, she says.")} for n in (4, 5)]
    path = write_lines(tmp_path / "documents.jsonl", *lines)
    tokenize(tmp_path / "run", inputs=[path], tokenizer=model)
    return tmp_path / "run/dataset/data"


def inspect(path: Path, *overrides: str, **settings: Any) -> None:
    inspect_config(path, overrides, **{"num_samples": 2, "row": None, "html": None, **settings})


def count(path: Path, *overrides: str, **settings: Any) -> None:
    count_config(path, overrides, **{"as_json": False, "per_sample": None, **settings})


def test_inspect_shows_the_first_rows_and_leaves_nothing(settings: Path, capfd):
    inspect(settings, "data.datasets[0].subsample_factor=0.01", "data.cache_dir=cache")
    shown = capfd.readouterr().out
    assert "⟦1 + 1 = 2!<|im_end|>⟧" in shown
    assert "⟦2 + 4 = 6!!<|im_end|>⟧" in shown
    assert "sequence 2 of sums.jsonl" in shown
    assert "row 3" not in shown
    assert [path.name for path in Path.cwd().iterdir()] == ["sft.yaml"]


def test_inspect_tells_what_is_read_and_what_is_not(settings: Path, tmp_path: Path, capfd):
    config = json.loads(settings.read_text())
    chat = [{"role": "user", "content": "1 + 1 =", "id": 7}]
    chat += [{"role": "assistant", "content": "2!", "weight": 0.5}]
    rows = [{"messages": chat, "source": "toy"}, {"messages": chat[:1]}]
    write_lines(tmp_path / "chats.jsonl", *rows)
    config["data"]["datasets"] = [{"path": str(tmp_path / "chats.jsonl")}]
    config["data"]["on_error"] = "skip"
    settings.write_text(json.dumps(config))
    inspect(settings)
    told = capfd.readouterr().err
    assert "data: chats.jsonl is read as messages (messages: role, content)" in told
    assert "data: chats.jsonl: 1 of 1 good rows (2 were read)" in told
    assert "data: chats.jsonl: also read: messages[].weight (1)" in told
    assert "data: chats.jsonl: not read: messages[].id (2), source (1)" in told


def test_inspect_row_is_the_one_that_training_reads(settings: Path, tmp_path: Path, capfd):
    config = json.loads(settings.read_text())
    packed = changed(config, **{"sft.packing": "bfd"})
    settings.write_text(json.dumps(packed))
    wanted = {key: packed[key] for key in ("data", "sft", "seed")}
    wanted["tokenizer"] = packed["model"]["path"]
    (tmp_path / "run").mkdir()
    context = StageContext(tmp_path / "run", input_fingerprints={"data.datasets[0].path": "x"})
    prepare(PrepareConfig.model_validate(wanted), context)
    inspect(settings, row=9)
    expected = capfd.readouterr().out
    assert "row 9: " in expected
    prepared = changed(config, **{"sft.packing": "bfd"})
    prepared["data"] = {"prepared": str(tmp_path / "run/dataset")}
    settings.write_text(json.dumps(prepared))
    inspect(settings, row=9)
    assert capfd.readouterr().out == expected


def test_inspect_row_beyond_the_last_is_refused(settings: Path):
    with pytest.raises(UsageError, match=r"--row: must be ≤ 50, the number of rows \(got 51\)"):
        inspect(settings, row=51)


def test_inspect_writes_one_page(settings: Path, tmp_path: Path, capfd):
    inspect(settings, html=Path("page.html"))
    assert capfd.readouterr().out == "page.html\n"
    page = (tmp_path / "page.html").read_text()
    assert "<title>sft.yaml</title>" in page
    assert "2 + 4 = 6!!" in page


def test_inspect_and_count_take_a_configuration_of_prepare(settings: Path, capfd):
    config = json.loads(settings.read_text())
    own = {"tokenizer": config["model"]["path"], "data": config["data"], "sft": config["sft"]}
    settings.write_text(json.dumps(own))
    inspect(settings, num_samples=1)
    assert "row 1: " in capfd.readouterr().out
    count(settings)
    assert capfd.readouterr().out.splitlines()[1].split()[:2] == ["sums.jsonl", "50"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "inputs: [x]\ntokenizer: y",
            "neither a configuration of sft, .* it has inputs, tokenizer",
        ),
        ("{}", "it has nothing"),
        ("model: {}\ndata: {}", "sft.yaml"),
    ],
)
def test_inspect_configuration_of_something_else_is_refused(
    content: str, message: str, settings: Path
):
    settings.write_text(content)
    with pytest.raises(UsageError, match=message):
        inspect(settings)


def test_inspect_names_every_missing_input(settings: Path):
    with pytest.raises(ConfigError) as caught:
        inspect(settings, "model.path=gone", "data.datasets[0].path=lost.jsonl")
    assert caught.value.faults == [
        "model.path: no such file or folder: gone",
        "data.datasets[0].path: no such file or folder: lost.jsonl",
    ]


def test_count_is_of_all_the_data(settings: Path, tmp_path: Path, capfd):
    count(settings, as_json=True, per_sample=Path("samples.tsv"))
    counts = json.loads(capfd.readouterr().out)
    [source] = counts["sources"]
    assert counts["rejected"] == {}
    assert (counts["num_rows"], source["name"], source["num_sequences"]) == (50, "sums.jsonl", 50)
    assert sum(each["num_sequences"] for each in counts["lengths"]) == 50
    lines = (tmp_path / "samples.tsv").read_text().splitlines()[1:]
    assert sum(int(line.split("\t")[4]) for line in lines) == source["num_tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.tsv", "sft.yaml"]


def test_indexed_is_shown_and_counted_with_its_kinds(prefix: Path, capfd):
    inspect_indexed(prefix, Path("spm.model"), num_samples=1, row=None, html=None)
    shown = capfd.readouterr()
    assert "⟦ It is 4, she says.<|assistant|><|endoftext|>⟧" in shown.out.replace("·", " ")
    assert "It is 5" not in shown.out
    assert "no kinds" not in shown.err
    for name in ("data_text_document", "data_text_document.idx"):
        inspect_indexed(prefix.with_name(name), Path("spm.model"), 1, None, None)
        assert capfd.readouterr().out == shown.out
    count_indexed(prefix, as_json=True, per_sample=None)
    recorded = json.loads((prefix.parent / "counts.json").read_text())
    [source] = json.loads(capfd.readouterr().out)["sources"]
    assert source["num_tokens"] == recorded["num_tokens"]
    assert source["num_trained_tokens"] == recorded["num_trained_tokens"]


def test_indexed_without_kinds_says_so(prefix: Path, capfd):
    for path in prefix.parent.glob("*_kinds_document.*"):
        path.unlink()
    count_indexed(prefix, as_json=False, per_sample=None)
    assert "no kinds beside it" in capfd.readouterr().err


def test_indexed_with_another_tokenizer_is_refused(prefix: Path, model: Path):
    with pytest.raises(PostTrainingError, match="is not in the tokenizer's vocabulary"):
        inspect_indexed(prefix, model, num_samples=5, row=None, html=None)


def test_indexed_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--tokenizer: no such file or folder: .*/gone"):
        inspect_indexed(tmp_path / "gone", tmp_path / "gone", num_samples=1, row=None, html=None)
    with pytest.raises(ConfigError, match=r"--indexed: no such file or folder: .*/gone\.idx"):
        count_indexed(tmp_path / "gone", as_json=False, per_sample=None)
