"""The pages for users of other systems: what stands on the right side exists, and the translations
run on the configurations of the importer's tests."""

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from post_training.config.reference import list_settings
from post_training.importers.run import Request, import_settings
from post_training.stages.registry import find_stage

from .test_docs import REPOSITORY, commands_in, problem_with

FOLDER = REPOSITORY / "docs/from"
PAGES = sorted(FOLDER.glob("*.md"))
FILES = Path(__file__).parent / "importers/files"
SETTINGS = {
    setting.path.replace("[]", "")
    for stage in ("sft", "dpo")
    for setting in list_settings(find_stage(stage).load_config_class())
}


def right_sides(page: Path) -> Iterator[str]:
    """Each piece of code in the second column of the page's tables."""
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) >= 2 and not set(cells[0]) <= set("-"):
            yield from re.findall(r"`([^`]+)`", cells[1])


def test_there_is_a_page_for_each_of_the_systems():
    assert [page.stem for page in PAGES] == [
        *("axolotl", "neox", "open-instruct", "openeurollm", "swissai"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_right_side_of_the_tables_exists(page: Path):
    problems = []
    for code in right_sides(page):
        words = shlex.split(code)
        if words[0] in ("post-training", "entrypoint", "make", "srun"):
            problems.append(problem_with(words))
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+|output_base|run_dir", code):
            problems.append(None if code in SETTINGS else f"no setting {code}")
    assert len(problems) > 8
    assert [problem for problem in problems if problem] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_translations_of_the_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    translations = [
        words for words in commands_in(page) if words[:2] == ["post-training", "import"]
    ]
    assert translations
    for _, _, system, *words in translations:
        files, options = [], {"--out": "", "--num-processes": "", "--set": ""}
        if any("COMMIT" in word for word in words):  # it goes with a download
            continue
        while words:
            word = words.pop(0)
            if word in options:
                options[word] = words.pop(0)
            else:
                files.append(word)
        processes = options["--num-processes"]
        imported = import_settings(
            Request(system, files, num_processes=int(processes) if processes else None)
        )
        assert imported.lines
        assert import_module(f"post_training.importers.{system}").TABLE
