"""An input that changes after its fingerprint was taken ends the run; nothing made of it stays."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.annotation_stages import run_stage
from helpers.row_files import write_rows
from helpers.stage_process import start_entrypoint
from post_training.core.errors import PostTrainingError
from post_training.models.reference import REFERENCE, Reference

ROWS = [{"question": f"What is {n}?", "answer": f"{n}."} for n in range(20)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def settings_of(stage: str, rows: Path, model: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"datasets": [{"path": str(rows)}]}
    match stage:
        case "split":
            return {"data": data, "eval_size": 5}
        case "prepare" | "filter":
            data["chat_template"] = "tulu"
            limits = {"sft": {"max_seq_length": 64}} if stage == "prepare" else {}
            limits |= {"max_sequence_length": 64} if stage == "filter" else {}
            return {"data": data, "tokenizer": str(model), **limits}
    return {"data": data}


@pytest.mark.parametrize("stage", ["mix", "split", "prepare", "filter"])
def test_stage_whose_rows_change_fails_and_leaves_no_dataset(
    stage: str, rows: Path, model: Path, tmp_path: Path
):
    with pytest.raises(PostTrainingError, match="changed after the run") as error:
        run_stage(
            stage,
            settings_of(stage, rows, model),
            tmp_path / "run",
            lambda: write_rows(rows, [*ROWS[:-1], {"question": "What is 19?", "answer": "20"}]),
        )
    assert error.value.where == str(rows)
    kept = [path.name for path in (tmp_path / "run").rglob("*") if path.suffix in (".jsonl", "")]
    assert not {"dataset", "rows.jsonl", "input.jsonl"} & set(kept)
    assert not list((tmp_path / "run").rglob("manifest.json"))


@pytest.mark.parametrize("stage", ["mix", "filter"])
def test_stage_whose_rows_get_another_reference_fails_and_carries_none_on(
    stage: str, rows: Path, model: Path, tmp_path: Path
):
    """reference.json is no setting: it lies beside the rows."""
    Reference("one", "t", "c", "float32").write(tmp_path)
    with pytest.raises(PostTrainingError, match="changed after the run") as error:
        run_stage(
            stage,
            settings_of(stage, rows, model),
            tmp_path / "run",
            lambda: Reference("two", "t", "c", "float32").write(tmp_path),
        )
    assert error.value.where == str(tmp_path / REFERENCE)
    assert not list((tmp_path / "run").rglob(REFERENCE))
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_chunk_that_a_changed_tokenizer_made_is_not_kept(
    rows: Path, init_model: Callable[..., Path], tmp_path: Path
):
    tokenizer = init_model(tmp_path / "made")

    def change() -> None:
        file = tokenizer / "tokenizer.json"
        file.write_text(file.read_text() + " ")

    with pytest.raises(PostTrainingError) as error:
        config = settings_of("filter", rows, tokenizer)
        run_stage("filter", config, tmp_path / "run", change)
    assert "tokenizer.json: changed after the run" in str(error.value)
    assert not list((tmp_path / "run").rglob("000000.json*"))


def test_cache_keeps_no_data_that_was_prepared_from_changed_rows(
    rows: Path, model: Path, tmp_path: Path
):
    config = {
        "model": {"path": str(model)},
        "data": settings_of("prepare", rows, model)["data"] | {"cache_dir": str(tmp_path / "c")},
        "sft": {"max_seq_length": 64},
        "training": {"max_steps": 1, "effective_batch_size": 2, "learning_rate": 1e-3},
    }
    with pytest.raises(PostTrainingError, match="changed after the run"):
        run_stage("sft", config, tmp_path / "run", lambda: write_rows(rows, ROWS[1:]))
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]
    assert not (tmp_path / "run/data").exists()


def test_model_that_changes_before_it_was_read_is_not_trained(
    rows: Path, init_model: Callable[..., Path], tmp_path: Path
):
    model = init_model(tmp_path / "made")
    config = {
        "model": {"path": str(model)},
        "data": settings_of("prepare", rows, model)["data"],
        "sft": {"max_seq_length": 64},
        "training": {"max_steps": 1, "effective_batch_size": 2, "learning_rate": 1e-3},
    }
    other = init_model(tmp_path / "other", seed=1)
    weights = "model.safetensors"
    with pytest.raises(PostTrainingError, match=f"{weights}: changed after the run"):
        run_stage(
            "sft",
            config,
            tmp_path / "run",
            lambda: (model / weights).write_bytes((other / weights).read_bytes()),
        )
    assert not (tmp_path / "run/steps.jsonl").exists()


def test_run_whose_input_changed_is_failed_in_one_line(rows: Path, tmp_path: Path):
    """The transform changes the file that it is given rows of."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "from post_training.data.transforms import register_transform\n"
        '@register_transform("same")\n'
        "def same(row):\n"
        f"    file = Path({str(rows)!r})\n"
        "    file.write_text(file.read_text().replace('19.', '20.'))\n"
        "    return row\n"
    )
    config = {
        "run_dir": str(tmp_path / "run"),
        "data": {
            "datasets": [{"path": str(rows), "transform": "same"}],
            "transforms": [str(tmp_path / "mine.py")],
        },
    }
    (tmp_path / "mix.yaml").write_text(json.dumps(config))
    log = tmp_path / "log"
    process = start_entrypoint(["mix", str(tmp_path / "mix.yaml"), "--unpinned"], log)
    process.join(60)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (process.exitcode, record["status"]) == (1, "failed")
    assert record["reason"].startswith(f"{rows}: changed after the run")
    assert f"error: {rows}: changed after the run" in log.read_text()
    assert not (tmp_path / "run/dataset").exists()
