import math
import re

from hypothesis import given
from hypothesis import strategies as st

from post_training.core.errors import UsageError
from post_training.core.yaml import dump, load

# Digits, signs and marks of YAML, so that text looks like numbers, keys and syntax.
tricky = st.text(alphabet="0123456789+-.eExonabfuls~: #'\"\\[]{},|>&*!%@`?<=\n\t\r\x85\u2028\ufeff")
texts = st.text() | tricky
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
plain_data = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=4) | st.dictionaries(texts, below, max_size=4),
    max_leaves=12,
)


def exact(data):
    """Also the types, the order of keys and the sign of zero, which == does not compare."""
    if isinstance(data, dict):
        return [(key, exact(value)) for key, value in data.items()]
    return [exact(item) for item in data] if isinstance(data, list) else (type(data), repr(data))


@given(plain_data)
def test_dumped_data_reads_back_equal(data):
    assert exact(load(dump(data), "f.yaml").data) == exact(data)


@given(plain_data)
def test_dumped_data_as_bytes_reads_back_equal(data):
    assert exact(load(dump(data).encode(), "f.yaml").data) == exact(data)


def test_dumped_nan_reads_back_as_nan():
    assert math.isnan(load(dump({"x": math.nan}), "f.yaml").data["x"])


def refusal(text):
    """The message for text that is not read, else None."""
    try:
        load(text, "f.yaml")
    except UsageError as error:
        return str(error)
    return None


@given(st.text() | tricky)
def test_any_text_is_read_or_refused_in_one_line(text):
    assert re.fullmatch(r"f\.yaml(:\d+)?: .+", refusal(text) or "f.yaml: is read")


# Numbers only: after text with line ends at its end, PyYAML closes the document with `...`.
numbers = st.recursive(
    st.integers(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(texts, numbers, min_size=1, max_size=4))
def test_every_key_has_the_line_it_is_written_in(data):
    parts = [dump({key: value}) for key, value in data.items()]
    document = load("".join(parts), "f.yaml")
    lines = [1 + "".join(parts[:number]).count("\n") for number in range(len(parts))]
    assert [document.lines[key,] for key in data] == lines
