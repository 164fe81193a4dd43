"""The documentation: what is made is up to date, links lead somewhere, and its commands exist."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from helpers.doc_blocks import PAGES, REPOSITORY, Block, blocks_of
from post_training.cli import build_app
from post_training.cli.edf import make_parsers
from post_training.stages.registry import STAGES

REFERENCE = REPOSITORY / "docs/reference"
APP = typer.main.get_command(build_app())


def commands_in(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's shell blocks."""
    for block in blocks_of(page, "sh"):
        yield from commands_of(block)


def commands_of(block: Block) -> Iterator[list[str]]:
    """Comments, variables and what a pipe or a here-document brings are left out."""
    text = re.sub(r"<<'?(\w+)'?\n.*?^\s*\1$", "", block.text, flags=re.MULTILINE | re.DOTALL)
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|", re.sub(r"\s+#.*|^\s*#.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:
                continue
            if words:
                yield words


def problem_with(words: list[str]) -> str | None:
    """Why a command of ours can't be: no such command, option, stage or target."""
    if "entrypoint" in words:
        stage = words[words.index("entrypoint") + 1]
        if stage not in {*STAGES, "chat", "doctor", "STAGE"}:
            return f"no stage {stage}"
    words = [Path(word).name if word.endswith("bin/post-training") else word for word in words]
    tests = [word for word in words[1:] if word.startswith("tests/")]
    if gone := [word for word in tests if not (REPOSITORY / word.split("::")[0]).exists()]:
        return f"no test {gone}"
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no target {unknown}" if unknown else None
    if "post-training" not in words or words[-1] == "post-training":
        return None
    words = words[words.index("post-training") + 1 :]
    command = APP
    while words and hasattr(command, "commands"):
        name, *words = words
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    if command.context_settings.get("ignore_unknown_options"):
        return None
    known = {option for parameter in command.params for option in parameter.opts}
    known |= {option for parameter in command.params for option in parameter.secondary_opts}
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    if "--" in words:
        given = [word for word in given if words.index(word) < words.index("--")]
    unknown = [option for option in given if option not in {*known, "--help"}]
    return f"no option {unknown}" if unknown else None


def test_reference_pages_are_those_of_today(tmp_path):
    """`make docs-reference` writes them."""
    made = runpy.run_path(str(REPOSITORY / "docs/make_reference.py"))
    made["write_pages"](tmp_path)
    written = {str(page.relative_to(tmp_path)): page.read_text() for page in tmp_path.rglob("*.md")}
    assert len(written) > len(STAGES)
    assert {name: (REFERENCE / name).read_text() for name in written} == written


def test_reference_has_no_page_of_a_stage_that_is_gone():
    pages = {page.stem for page in (REFERENCE / "settings").glob("*.md")}
    assert pages == {*STAGES, "index", "optimizers", "site", "pipeline"}


def test_every_link_and_anchor_of_the_pages_leads_somewhere(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going"),
            *("-d", tmp_path / "doctrees", "-c", REPOSITORY / "docs"),
            *(REPOSITORY, tmp_path / "html"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert (tmp_path / "html/docs/reference/settings/sft.html").exists()


def test_side_bar_and_index_have_every_page():
    contents = runpy.run_path(str(REPOSITORY / "docs/conf.py"))["_CONTENTS"]
    bar = {page for pages in contents.values() for page in pages}
    index = (REPOSITORY / "docs/README.md").read_text()
    folders = ("start", "guides", "from", "concepts")
    pages = [page for name in folders for page in (REPOSITORY / "docs" / name).glob("*.md")]
    assert len(pages) > 25
    names = {page: str(page.relative_to(REPOSITORY).with_suffix("")) for page in pages}
    assert [name for name in names.values() if name not in bar] == []
    assert [name for name in names.values() if f"({name[5:]}.md)" not in index] == []


def test_page_of_the_nouns_has_every_stage_and_preset():
    page = (REPOSITORY / "docs/concepts/nouns.md").read_text()
    assert [stage for stage in STAGES if f"| `{stage}` |" not in page] == []
    presets = [path.stem for path in (REPOSITORY / "src").rglob("config/presets/*.yaml")]
    shortened = {name: f"`{name.removeprefix('alignment')}`" for name in presets}
    assert len(presets) > 5
    missing = [name for name in presets if f"`{name}`" not in page and shortened[name] not in page]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_the_page_exist(page):
    found = {" ".join(words): problem_with(words) for words in commands_in(page)}
    assert {words: problem for words, problem in found.items() if problem} == {}


def test_commands_check_notices_what_is_not_there():
    assert problem_with(["post-training", "runs", "lst"]) == "no command lst"
    assert problem_with(["post-training", "runs", "list", "--frob"]) == "no option ['--frob']"
    assert problem_with(["srun", "entrypoint", "sftt", "x"]) == "no stage sftt"
    assert problem_with(["make", "images"]) == "no target ['images']"
    assert problem_with(["pytest", "tests/unit/gone"]) == "no test ['tests/unit/gone']"
    assert problem_with([".venv/bin/post-training", "runs", "list", "--json"]) is None


def test_commands_check_reads_the_blocks():
    ours = [w for page in PAGES for w in commands_in(page) if {"post-training", "make"} & set(w)]
    assert len(ours) > 60


def test_troubleshooting_quotes_messages_that_exist():
    page = (REPOSITORY / "docs/guides/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    sources = "".join(path.read_text() for path in (REPOSITORY / "src").rglob("*.py"))
    assert len(quoted) > 10
    of_bash = "entrypoint: command not found"
    assert [text for text in quoted if text not in sources and text != of_bash] == []


def test_reference_has_every_option_of_edf_run():
    """It starts without typer; the command that typer shows only describes it."""
    _, running = make_parsers()
    real = {option for action in running._actions for option in action.option_strings}
    shown = APP.commands["edf"].commands["run"].params
    assert {option for each in shown for option in each.opts if option[0] == "-"} == real - {
        *("-h", "--help"),
    }
