import pytest

from post_training.core.errors import dotted, shown


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("seed",), "seed"),
        (("data", "datasets", 0, "path"), "data.datasets[0].path"),
        (("grid", 1, 2), "grid[1][2]"),
    ],
)
def test_dotted_path_is_written_as_an_override_would(path, text):
    assert dotted(path) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("no", "'no'"),
        ("a\nb", r"'a\nb'"),
        (None, "null"),
        (True, "true"),
        (5e-7, "5e-07"),
        ([1, "a", None], "[1, 'a', null]"),
        ({"lr": 1, "tags": []}, "{lr: 1, tags: []}"),
    ],
)
def test_shown_value_is_one_line(value, text):
    assert shown(value) == text


def test_shown_long_value_is_cut():
    assert shown("x" * 100) == "'" + "x" * 59 + "..."
    assert shown("x" * 100, limit=None) == repr("x" * 100)
