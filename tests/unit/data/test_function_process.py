"""What a function of the user's may do, and what then becomes of the run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.config import FunctionLimits
from post_training.data.transforms import find_transform

ROWS = [{"n": n} for n in range(3)]
Call = Callable[..., list]


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Rows through `def f(row)`, whose body is given. top: code before it."""

    def call(body: str, *, top: str = "", rows: list[dict] = ROWS, **limits: float) -> list:
        path = tmp_path / "mine.py"
        path.write_text(
            "import os, subprocess, sys, threading, time\n"
            "from post_training.data.transforms import register_transform\n"
            f"{top}\n"
            f"@register_transform('f')\ndef f(row):\n    {body}\n    return row\n"
        )
        limited = FunctionLimits.model_validate(limits)
        return list(find_transform("f", [path], limited)(rows, "rows.jsonl:{}".format))

    return call


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("sys.exit(0)", "must return or raise an Exception (raised mine.py:7: SystemExit: 0)"),
        ("raise KeyboardInterrupt", "must return or raise an Exception (raised mine.py:7: Keyb"),
        ("os._exit(0)", "ended its process with exit code 0, and must return or raise an error"),
        ("os.kill(os.getpid(), 9)", "ended its process by SIGKILL: most often the machine ran out"),
        ("os.closerange(3, 99); time.sleep(9)", "closed the connection to its process"),
        ("return [lambda: 1]", "must return a dict, a list of dicts or None (got function)"),
        ("row['f'] = lambda: 1", "returned something that is not data: "),
    ],
)
def test_function_that_does_not_return_fails_with_its_file_and_row(
    body: str, problem: str, call: Call
):
    with pytest.raises(PostTrainingError) as error:
        call(f"\n    if row['n'] == 1:\n        {body}".replace("\n    if", "if", 1))
    assert str(error.value).startswith(f"rows.jsonl:1: transform 'f' of mine.py {problem}")


def test_file_of_the_working_folder_is_no_module(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "pickle.py").write_text("raise SystemExit('of the working folder')")
    monkeypatch.chdir(tmp_path)
    assert call("pass") == [[row] for row in ROWS]


def test_endless_loop_ends_at_the_limit_and_names_the_row(call: Call):
    with pytest.raises(PostTrainingError) as error:
        call("while row['n'] == 2: pass", timeout_s=3)
    assert error.value.problem == "transform 'f' of mine.py did not end within 3 s"
    assert (error.value.where, error.value.hint) == (
        "rows.jsonl:2",
        "if it needs longer, set data.function_limits.timeout_s",
    )


def test_many_calls_may_take_longer_than_one(call: Call):
    assert call("time.sleep(0.6)", rows=ROWS * 2, timeout_s=3) == [[row] for row in ROWS * 2]


@pytest.mark.parametrize(
    ("top", "limit_s", "problem"),
    [
        ("os._exit(0)", 60, "can't be loaded: it ended its process with exit code 0"),
        ("while True: pass", 1, "can't be loaded: it did not end within 1 s"),
    ],
)
def test_file_that_is_not_loaded_is_refused(
    top: str, limit_s: float, problem: str, call: Call, tmp_path: Path
):
    with pytest.raises(PostTrainingError) as error:
        call("pass", top=top, timeout_s=limit_s)
    assert str(error.value).startswith(f"{tmp_path / 'mine.py'}: {problem}")


def test_file_that_exits_is_refused_with_its_line(call: Call, tmp_path: Path):
    with pytest.raises(UsageError) as error:
        call("pass", top="sys.exit(0)")
    assert str(error.value) == f"{tmp_path / 'mine.py'}:3: can't be loaded: SystemExit: 0"


def test_folder_threads_and_signals_of_a_function_stay_with_it(call: Call):
    here = os.getcwd()
    body = "os.chdir('/'); threading.Thread(target=time.sleep, args=(99,)).start()"
    assert call(f"{body}; os.kill(os.getpid(), 15)") == [[row] for row in ROWS]
    assert os.getcwd() == here


def test_function_that_ended_its_process_is_started_again_for_the_next_call(call: Call):
    with pytest.raises(PostTrainingError):
        call("os._exit(3)")
    assert call("pass") == [[row] for row in ROWS]


def test_result_beyond_the_limit_fails_with_its_size(call: Call):
    with pytest.raises(
        PostTrainingError, match=r"returned 10,\d+ bytes \(the limit is 5,000: data"
    ):
        call("return {'text': 'x' * 10_000}", max_result_bytes=5000)


def test_rows_larger_than_a_pipe_go_through(call: Call):
    rows = [{"text": "x" * 300_000, "n": n} for n in range(40)]
    assert call("row = {**row, 'more': row['text']}", rows=rows)[39][0]["more"] == rows[39]["text"]


def test_what_a_function_prints_goes_to_stderr_up_to_the_limit(call: Call, capfd):
    body = "print('x' * 99); sys.stdout.buffer.write(b'y'); os.write(1, b'z')"
    call(body, max_printed_bytes=150)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("x" * 99 + "\nyz" + "x" * 49)
    assert (
        printed.err.count("mine.py: prints more than data.function_limits.max_printed_bytes") == 1
    )
    assert printed.err.count("x") == 148 + 1  # that of max_printed_bytes
