"""Transforms from files of the user's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.worker_functions import twice
from post_training.core.errors import PostTrainingError, UsageError
from post_training.data.config import FunctionLimits
from post_training.data.public.kinds import BUILT_IN_TRANSFORMS
from post_training.data.rows import BadRow
from post_training.data.transforms import find_transform
from post_training.data.workers import ordered_map

HEAD = "from post_training.data.transforms import register_transform\n"
SHORT = """
@register_transform("short")
def short(row):
    return row if len(row["answer"]) < 5 else None

@register_transform("twice")
def twice(row):
    return [row, {"answer": row["answer"] * 2}]
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(code: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.write_text(HEAD + code)
        return path

    return write


def apply(name: str, path: Path, *rows: dict) -> list:
    return list(find_transform(name, [path], FunctionLimits())(rows, "row {}".format))


def test_transform_keeps_changes_multiplies_or_leaves_out(write: Write):
    path = write(SHORT)
    assert apply("short", path, {"answer": "abc"}, {"answer": "abcdef"}) == [
        [{"answer": "abc"}],
        [],
    ]
    assert apply("twice", path, {"answer": "ab"}) == [[{"answer": "ab"}, {"answer": "abab"}]]


def test_transform_file_is_executed_once_and_leaves_nothing_beside_it(write: Write, tmp_path: Path):
    code = f"open({str(tmp_path / 'log')!r}, 'a').write('x')\n"
    paths = [write(code + SHORT), write(SHORT.replace("short", "s").replace("twice", "t"), "b.py")]
    for name in ("short", "t", "s"):
        find_transform(name, paths, FunctionLimits())
    assert (tmp_path / "log").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.py", "log", "mine.py"]


def test_transform_works_in_worker_processes(write: Write):
    rows = list(ordered_map(twice, [write(SHORT)], ["a", "b", "c"], num_workers=2))
    assert rows == [[{"answer": text}, {"answer": text * 2}] for text in "abc"]


def test_transform_that_raises_spoils_only_its_row(write: Write):
    good = {"answer": "abc"}
    first, bad, last = apply("short", write(SHORT), good, {"question": "?"}, good)
    assert first == last == [good]
    fault = ("transform", "transform short: mine.py:5: KeyError: 'answer'")
    assert (bad.reason, bad.problem) == fault


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        # The file's own line, not that of the library it calls.
        ("import json\n@mark\ndef f(row):\n    return json.loads('{')\n", "mine.py:6: JSONDecodeE"),
        ("import ast\n@mark\ndef f(row):\n    return ast.literal_eval('(')\n", "mine.py:6: Syntax"),
        ("def g(row):\n    return row['a']\n@mark\ndef f(row): return g(row)\n", "mine.py:4: KeyE"),
        ("mark(int)\n", "mine.py: TypeError: int() argument must be"),
    ],
)
def test_transform_that_raises_names_the_last_line_of_its_file(code: str, fault: str, write: Write):
    path = write("mark = register_transform('f')\n" + code)
    [bad] = apply("f", path, {})
    assert isinstance(bad, BadRow)
    assert bad.problem.startswith(f"transform f: {fault}")


@pytest.mark.parametrize(("result", "kind"), [("3", "int"), ("[row, 'x']", "str"), ("''", "str")])
def test_transform_that_returns_no_row_is_refused(result: str, kind: str, write: Write):
    path = write(f"@register_transform('f')\ndef f(row): return {result}\n")
    with pytest.raises(PostTrainingError) as error:
        apply("f", path, {})
    assert str(error.value) == (
        f"row 0: transform 'f' of mine.py must return a dict, a list of dicts or None (got {kind})"
    )


def test_transform_with_an_unknown_name_is_refused_with_the_nearest(write: Write):
    with pytest.raises(UsageError) as error:
        apply("shrot", write(SHORT))
    assert error.value.problem == (
        "transform: unknown name 'shrot', did you mean 'short'?; known: short, twice; "
        f"built in: {', '.join(BUILT_IN_TRANSFORMS)}"
    )
    with pytest.raises(UsageError, match=r"data.transforms names no file"):
        find_transform("short", [], FunctionLimits())


@pytest.mark.parametrize(
    ("code", "line", "problem"),
    [
        ("def f(:\n", 2, "can't be loaded: SyntaxError: invalid syntax"),
        ("\nimport nowhere_to_be_found\n", 3, "can't be loaded: ModuleNotFoundError: No module"),
        ("x = {}\nx['a']\n", 3, "can't be loaded: KeyError: 'a'"),
        ("import sys\nsys.exit(0)\n", 3, "can't be loaded: SystemExit: 0"),
        ("", None, "registers no transform"),
        (SHORT + SHORT, None, "transform 'short' is registered twice"),
    ],
)
def test_transform_file_that_fails_is_refused_with_its_line(
    code: str, line: int | None, problem: str, write: Write
):
    path = write(code)
    with pytest.raises(UsageError) as error:
        find_transform("f", [path], FunctionLimits())
    assert error.value.problem.startswith(problem)
    assert error.value.where == (f"{path}:{line}" if line else str(path))


def test_transform_name_of_two_files_is_refused(write: Write):
    first, second = write(SHORT), write(SHORT, "other.py")
    with pytest.raises(UsageError) as error:
        find_transform("f", [first, second], FunctionLimits())
    assert str(error.value) == f"{second}: transform 'short' is registered by {first} too"


def test_transform_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read: no such file"):
        find_transform("f", [tmp_path / "x.py"], FunctionLimits())
