"""What the command line says of itself, and of commands that are none."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from helpers.terminal import run_in_terminal
from post_training.stages.__main__ import main as entrypoint


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("runs show", "error: post-training runs show: Missing argument 'RUN'"),
        ("runs lst", "error: post-training runs: No such command 'lst'. Did you mean 'list'?"),
        ("runs list --frob", "error: post-training runs list: No such option: --frob"),
    ],
)
def test_command_line_that_is_wrong_is_told_in_one_line_and_where_to_read_more(cli, words, told):
    done = subprocess.run([cli, *words.split()], capture_output=True, text=True)
    command = told.split(": ")[1]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{told}\nhint: {command} --help\n"


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        ("runs list --since now", "--since: must be a date such as 2026-01-31 (got 'now')", None),
        *(
            (
                f"edf run {words}",
                "post-training edf run: the command is missing, which comes after `--`",
                "post-training edf run [OPTIONS] ENVIRONMENT -- COMMAND …",
            )
            for words in ("", "post-training", "post-training true", "post-training --")
        ),
        (
            "edf run x y -- true",
            "post-training edf: unrecognized arguments: y",
            "post-training edf --help",
        ),
        (
            "edf run --mount -- true",
            "post-training edf run: argument --mount: expected one argument",
            "post-training edf run --help",
        ),
    ],
)
def test_command_line_that_lacks_something_says_what(post_training, words, told, hint):
    done = post_training(*words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {told}\n" + (f"hint: {hint}\n" if hint else "")


@pytest.mark.parametrize(("words", "code"), [("", 2), ("runs", 2), ("runs --help", 0)])
def test_command_line_help_is_all_that_is_printed(cli, words, code):
    done = subprocess.run([cli, *words.split()], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert "Usage: post-training" in done.stdout


@pytest.mark.parametrize(
    ("words", "wish"),
    [
        ("--help", {"NO_COLOR": "1"}),
        ("--help", {"TERM": "dumb"}),
        ("runs lst", {"NO_COLOR": "1"}),
        ("-m post_training.stages sft --help", {"NO_COLOR": "1"}),
    ],
)
def test_nothing_is_coloured_where_no_colours_are_wanted(cli, tmp_path, words, wish):
    program = sys.executable if words.startswith("-m") else cli
    code, shown = run_in_terminal([program, *words.split()], tmp_path, **wish)
    assert (code, "\x1b" in shown) == (2 if words == "runs lst" else 0, False)
    assert shown.strip()


def test_help_is_coloured_in_a_terminal_and_not_in_a_pipe(cli, tmp_path):
    _, shown = run_in_terminal([cli, "runs", "--help"], tmp_path)
    assert "\x1b[1m" in shown
    piped = subprocess.run([cli, "runs", "--help"], capture_output=True, text=True)
    assert "\x1b" not in piped.stdout + piped.stderr


def test_settings_command_lists_all_and_explains_one(post_training):
    listed = post_training("settings", "sft")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "training.learning_rate" in listed.stdout
    explained = post_training("settings", "sft", "training.learning_rate").stdout
    assert explained.startswith("training.learning_rate: a number > 0, required [recipe]\n    ")
    as_json = json.loads(post_training("settings", "sft", "seed", "--json").stdout)
    assert [(one["path"], one["default"], one["role"]) for one in as_json] == [
        ("seed", "0", "recipe")
    ]
    wrong = post_training("settings", "sft", "learning_rate")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == (
        "error: no setting 'learning_rate'\nhint: did you mean training.learning_rate?\n"
    )


def test_version_is_that_of_the_package(post_training):
    done = post_training("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"post-training {version('post-training')}\n"


def test_completion_finds_commands_and_options(cli):
    """As bash asks for it."""
    for words, wanted in {"post-training ru": "runs", "post-training runs li": "list"}.items():
        asked = {
            "_POST_TRAINING_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run([cli], env=os.environ | asked, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()) == (0, [wanted])


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        ("", "entrypoint: the following arguments are required: STAGE, cfg.yaml", "entrypoint -"),
        ("sfd", "no stage 'sfd'", "there are: init-model, mix, "),
        ("sfd cfg.yaml", "no stage 'sfd'", "there are: "),
        ("sft", "entrypoint sft: the configuration file is missing", "entrypoint sft cfg.yaml; "),
        ("sft run_dir=x", "entrypoint sft: the configuration file is missing", "entrypoint sft "),
        ("sft a.yaml --lr 3", "entrypoint: unrecognized arguments: --lr 3", "entrypoint --help"),
        ("exec --input a", "--input and --output want a command after --", "entrypoint exec "),
    ],
)
def test_entrypoint_that_is_wrong_is_told_in_one_line(capsys, words, told, hint):
    assert entrypoint(words.split()) == 2
    error, advice = capsys.readouterr().err.splitlines()
    assert error == f"error: {told}"
    assert advice.startswith(f"hint: {hint}")


def test_entrypoint_help_of_a_stage_needs_no_file(capsys):
    with pytest.raises(SystemExit) as ended:
        entrypoint(["sft", "--help"])
    assert ended.value.code == 0
    assert "stages:\n  init-model" in capsys.readouterr().out
