"""The blocks of the documentation: commands that need no image are run, and settings exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.doc_blocks import LAPTOP, PAGES, REPOSITORY, blocks_of, blocks_without_mark
from helpers.doc_blocks import unknown_marks as marks_that_mean_nothing
from helpers.finished_runs import finish_run
from post_training.config.reference import list_settings
from post_training.slurm.pipeline import PipelineConfig
from post_training.stages.registry import STAGES, find_stage

from .test_docs import APP, commands_of

# Its blocks are run by tests/images/test_docs.py; those of docs/from by test_from_pages.py.
RUN_ELSEWHERE = {LAPTOP, *(REPOSITORY / "docs/from").glob("*.md")}
RUN_HERE = [page for page in PAGES if page not in RUN_ELSEWHERE and blocks_without_mark(page)]
SITES_FILE = "# ~/.config/post-training/sites.yaml"


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the guides speak of: finished runs, a model, rows."""
    for name in ("runs/one", "runs/two", "runs/sft"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        finish_run(tmp_path, name)
    (tmp_path / "models/base").mkdir(parents=True)
    (tmp_path / "models/base/config.json").write_text("{}")
    row = '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}'
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", RUN_HERE, ids=name_of)
def test_commands_of_the_page_run(page, folder, capsys):
    for block in blocks_without_mark(page):
        for program, *words in commands_of(block):
            assert program == "post-training"
            try:
                code = APP.main(args=words, standalone_mode=False)
            except SystemExit as ended:
                code = ended.code
            assert not code, words
    assert capsys.readouterr().out


def test_pages_whose_commands_are_run_are_many():
    assert len(RUN_HERE) >= 6
    assert blocks_without_mark(LAPTOP)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_marks_of_blocks_mean_something(page):
    assert marks_that_mean_nothing(page) == []
    assert [
        each for word in ("bash", "shell", "console") for each in blocks_of(page, word)
    ] == [] or (page.parent.name == "reference")


def settings_of(model: type) -> tuple[set[str], set[str]]:
    """(every path, those with no setting below, where anything may stand)"""
    paths = {each.path.replace("[]", "") for each in list_settings(model)} | {"extends"}
    blocks = {path[: found.start()] for path in paths for found in re.finditer(r"\.", path)}
    return paths, paths - blocks


SETTINGS = {stage: settings_of(find_stage(stage).load_config_class()) for stage in STAGES}


def paths_in(value: Any, prefix: str = "") -> Iterator[str]:
    """The dotted path of each value; items of a list have the list's."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(each, dict | list) for each in value):
        for each in value:
            yield from paths_in(each, prefix)
    else:
        yield prefix


def unknown_settings(block: dict[str, Any], stage: str) -> list[str]:
    paths, open_ended = SETTINGS[stage]
    return [
        path
        for path in paths_in(block)
        if path not in paths and not any(path.startswith(f"{each}.") for each in open_ended)
    ]


def fewest_unknown(block: dict[str, Any]) -> list[str]:
    """The unknown settings, for the stage that knows most of them; of a pipeline, of each stage."""
    if "stages" not in block:
        return min((unknown_settings(block, stage) for stage in STAGES), key=len)
    faults = [key for key in block if key not in PipelineConfig.model_fields]
    for each in block["stages"].values():
        faults += unknown_settings(each.get("config", {}), each["stage"])
    return faults


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks_of(page, "yaml"))], ids=name_of
)
def test_settings_in_the_blocks_of_the_page_exist(page):
    for block in blocks_of(page, "yaml"):
        found = yaml.safe_load(block.text)
        is_of_sites = block.text.startswith(SITES_FILE) or set(found) <= {"clariden", "lumi"}
        assert is_of_sites or fewest_unknown(found) == [], block.text


BLOCKS = {path.split(".")[0] for paths, _ in SETTINGS.values() for path in paths if "." in path}
INLINE = re.compile(r"`([a-z_]+(?:\.[a-z_0-9]+)+)(?:[:=][^`\n]*)?`")
FILE = re.compile(r".*\.(json|jsonl|yaml)")
TENSORS = {"model.language_model"}


def is_known(path: str) -> bool:
    return any(
        path in paths or any(path.startswith(f"{each}.") for each in open_ended)
        for paths, open_ended in SETTINGS.values()
    )


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.parent.name not in ("from", "reference")], ids=name_of
)
def test_settings_in_the_text_of_the_page_exist(page):
    """Pages of docs/from name other systems' settings too: test_from_pages.py reads them."""
    named = {path for path in INLINE.findall(page.read_text()) if path.split(".")[0] in BLOCKS}
    unknown = {path for path in named if not FILE.fullmatch(path) and not is_known(path)}
    assert unknown - TENSORS == set()


def test_check_of_settings_notices_what_is_not_there():
    assert unknown_settings({"training": {"lr": 1}}, "sft") == ["training.lr"]
    assert unknown_settings({"data": {"datasets": [{"pth": "x"}]}}, "sft") == ["data.datasets.pth"]
    assert unknown_settings({"training": {"lr_scheduler_kwargs": {"any": 1}}}, "sft") == []
    assert fewest_unknown({"stages": {"one": {"stage": "sft", "config": {"sed": 1}}}}) == ["sed"]
    assert not is_known("training.lr")
    assert is_known("training.learning_rate")
