"""The same rows whoever prepares them, in however many processes; and where a run finds them."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from helpers.sft_runs import changed, metrics, sft, stable_files
from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.hashing import hash_files
from post_training.stages.config import PrepareConfig
from post_training.stages.context import StageContext
from post_training.stages.prepare import run


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough bytes for several chunks, and a bad row in the second."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with open(path, "w") as file:
        for n in range(3000):
            question = {"role": "user", "content": f"{n}? " + "why " * (n % 97)}
            answer = {"role": "assistant", "content": "" if n == 2500 else "so " * (1 + n % 31)}
            row = {"messages": [question, answer], "note": "x" * 300}
            file.write(json.dumps(row) + "\n")
    return path


def prepare(run_dir: Path, model: Path, data: dict[str, Any], **limits: Any) -> Any:
    run_dir.mkdir(exist_ok=True)
    config = {
        "tokenizer": str(model),
        "data": {"chat_template": "chatml", **data},
        "sft": {"max_seq_length": 600} | limits,
    }
    fingerprints = {f"data.datasets[{n}].path": "…" for n in range(len(data["datasets"]))}
    context = StageContext(run_dir, input_fingerprints=fingerprints)
    return run(PrepareConfig.model_validate(config), context)


def test_prepare_bytes_do_not_depend_on_the_number_of_workers(
    chats: Path, model: Path, tmp_path: Path
):
    for workers in (1, 2, 3):
        data = {"datasets": [{"path": str(chats)}], "on_error": "skip", "num_workers": workers}
        prepare(tmp_path / str(workers), model, data, packing="bfd")
    first, *others = (hash_files(tmp_path / str(workers)) for workers in (1, 2, 3))
    assert others == [first, first]


def test_prepare_counts_and_names_what_it_left_out(chats: Path, model: Path, tmp_path: Path):
    data = {"datasets": [{"path": str(chats), "name": "chats"}], "on_error": "quarantine"}
    result = prepare(
        tmp_path / "run", model, data, packing="bfd", overlong="drop", max_seq_length=256
    )
    record = json.loads((tmp_path / "run/dataset/prepared.json").read_text())
    rejects = list(map(json.loads, (tmp_path / "run/rejects.jsonl").read_text().splitlines()))
    assert record["rejected"]["empty"] == 1
    assert record["rejected"]["too-long"] > 100
    assert len(rejects) == sum(record["rejected"].values())
    [empty] = [row for row in rejects if row["reason"] == "empty"]
    assert empty["line"] == 2501
    assert json.loads(empty["raw"])["messages"][0]["content"].startswith("2500? ")
    lines = chats.read_bytes()
    assert lines[empty["byte"] :].startswith(empty["raw"].encode())
    [source] = record["sources"]
    assert source["num_used"] == 3000 - len(rejects)
    assert source["name"] == "chats"
    assert source["read_as"] == "messages (messages: role, content)"
    assert record["counts"]["utilisation"] > 0.9
    assert result.metrics["num_rejected_empty"] == 1


def test_prepare_fails_at_the_first_bad_row_and_leaves_nothing(
    chats: Path, model: Path, tmp_path: Path
):
    with pytest.raises(PostTrainingError, match=r"chats.jsonl:2501: .*is empty"):
        prepare(tmp_path / "run", model, {"datasets": [{"path": str(chats)}]})
    assert not (tmp_path / "run/dataset").exists()
    assert not list((tmp_path / "run").glob(".dataset*"))


def test_prepare_killed_after_its_dataset_was_written_ends_all_the_same(
    chats: Path, model: Path, tmp_path: Path
):
    data = {"datasets": [{"path": str(chats)}], "on_error": "skip"}
    first = prepare(tmp_path / "run", model, data)
    before = hash_files(tmp_path / "run")
    assert prepare(tmp_path / "run", model, data) == first
    assert hash_files(tmp_path / "run") == before


def test_prepare_debug_subsample_uses_the_first_rows(chats: Path, model: Path, tmp_path: Path):
    for workers in (1, 3):
        data = {"datasets": [{"path": str(chats)}], "debug_subsample": 10, "num_workers": workers}
        prepare(tmp_path / str(workers), model, data)
    record = json.loads((tmp_path / "1/dataset/prepared.json").read_text())
    assert record["counts"]["num_rows"] == 10
    # Workers that were ahead have left nothing.
    assert hash_files(tmp_path / "1") == hash_files(tmp_path / "3")


def test_sft_on_prepared_data_is_sft_on_its_sources(
    config: dict[str, Any], dataset: Path, dropout_model: Path, tmp_path: Path
):
    sft(config, tmp_path / "one")
    data = {key: config["data"][key] for key in ("datasets", "chat_template")}
    prepare(tmp_path / "prepare", dropout_model, data, max_seq_length=96)
    prepared = {**config, "data": {"prepared": str(tmp_path / "prepare/dataset")}}
    sft(prepared, tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    one, two = stable_files(tmp_path / "one"), stable_files(tmp_path / "two")
    assert {name for name in one if one[name] != two.get(name)} <= {
        name for name in one if name.startswith("data/")
    }


def test_sft_refuses_data_prepared_otherwise(
    config: dict[str, Any], init_model: Any, dropout_model: Path, tmp_path: Path
):
    data = {key: config["data"][key] for key in ("datasets", "chat_template")}
    prepare(tmp_path / "prepare", dropout_model, data, max_seq_length=96)
    prepared = {**config, "data": {"prepared": str(tmp_path / "prepare/dataset")}}
    with pytest.raises(UsageError, match=r"other settings: sft\.max_seq_length: 96 -> 64"):
        sft(changed(prepared, **{"sft.max_seq_length": 64}), tmp_path / "a")
    # What is asked for beside the folder is what it was prepared with, or is told.
    with pytest.raises(UsageError, match=r"data\.train_on: 'all_turns' -> 'last_turn'"):
        sft(changed(prepared, **{"data.train_on": "last_turn"}), tmp_path / "c")
    other = init_model(tmp_path / "other", vocab_size=300)
    with pytest.raises(UsageError, match="another tokenizer than the model's"):
        sft(changed(prepared, **{"model.path": str(other)}), tmp_path / "b")


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def test_sft_finds_prepared_data_in_the_cache_until_something_changes(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cache = tmp_path / "cache"
    config = changed(config, **{"data.cache_dir": str(cache), "training.max_steps": 1})
    sft(config, tmp_path / "first")
    assert "found in the cache" not in capsys.readouterr().err
    [entry] = entries(cache)
    assert (tmp_path / "first/data").resolve() == entry
    # Neither the training nor the number of workers is part of the data.
    again = {"training.learning_rate": 0.5, "data.num_workers": 1}
    sft(changed(config, **again), tmp_path / "again")
    assert "found in the cache" in capsys.readouterr().err
    assert entries(cache) == [entry]
    sft(changed(config, **{"sft.max_seq_length": 95}), tmp_path / "limit")
    sft(changed(config, **{"data.chat_template": "tulu"}), tmp_path / "template")
    sft(changed(config, seed=9), tmp_path / "seed")
    sft(config, tmp_path / "input", fingerprint="b")
    assert len(entries(cache)) == 5


@pytest.mark.parametrize("is_cached", [True, False])
def test_sft_prepared_data_that_was_changed_since_is_refused(
    config: dict[str, Any], tmp_path: Path, is_cached: bool
):
    """In the cache, for another run; in RUN/data, for the next attempt of this one."""
    cache = {"data.cache_dir": str(tmp_path / "cache")} if is_cached else {}
    config = changed(config, **{**cache, "training.max_steps": 1})
    sft(config, tmp_path / "run")
    tokens = tmp_path / "run/data/tokens.bin"
    tokens.write_bytes(bytes([tokens.read_bytes()[0] ^ 1]) + tokens.read_bytes()[1:])
    with pytest.raises(UsageError, match=r"tokens\.bin: is not what was prepared"):
        sft(config, tmp_path / ("another" if is_cached else "run"))


def test_sft_jobs_that_want_the_same_data_make_it_once(config: dict[str, Any], tmp_path: Path):
    cache = tmp_path / "cache"
    config = changed(config, **{"data.cache_dir": str(cache), "training.max_steps": 1})
    # Not forked from this process, which has torch's threads.
    process = multiprocessing.get_context("forkserver").Process
    jobs = [process(target=sft, args=(config, tmp_path / str(n))) for n in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len(entries(cache)) == 1
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]
    weights = {hash_files(tmp_path / str(n) / "model")["model.safetensors"] for n in range(3)}
    assert len(weights) == 1
