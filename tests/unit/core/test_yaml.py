import math

import pytest

from post_training.core.errors import UsageError
from post_training.core.yaml import MAX_DEPTH, dump, load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12", -12),
        ("+12", 12),
        ("0777", 777),
        ("0o17", 15),
        ("0x1F", 31),
        ("5e-7", 5e-7),
        ("1e3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5E+2", -150.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("+.INF", math.inf),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("Null", None),
        ("~", None),
        ("", None),
    ],
)
def test_plain_scalar_of_the_core_schema_is_typed(text, value):
    read = load(f"x: {text}", "f.yaml").data["x"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("no", "yes", "on", "off", "y", "n"),
        *("12:30:00", "2020-01-01", "2020-01-01T00:00:00Z", "1:30"),
        *(
            "1_000",
            "0b11",
            "0x",
            "0o8",
            "-0x1F",
            "1e",
            ".",
            "+",
            "e5",
            "tRue",
            "nULL",
            "inf",
            "nan",
        ),
        *("1.2.3", "=", "1,5"),
    ],
)
def test_plain_scalar_outside_the_core_schema_is_text(text):
    assert load(f"x: {text}", "f.yaml").data == {"x": text}


@pytest.mark.parametrize("text", ["'12'", '"true"', "'~'", "''", "|-\n  12", ">-\n  null"])
def test_quoted_or_block_scalar_is_text(text):
    assert isinstance(load(f"x: {text}", "f.yaml").data["x"], str)


def test_nan_is_a_number():
    assert math.isnan(load("x: .NaN", "f.yaml").data["x"])


def test_lines_of_keys_and_items_are_those_of_the_file():
    text = """\
# a comment

training:
  lr: 1   # line 4
  note: |
    two
    lines
data:
  datasets:
    - path: a
      weight: 2
    -
      path: b
  mix: [x,
        y]
"""
    assert load(text, "f.yaml").lines == {
        (): 3,
        ("training",): 3,
        ("training", "lr"): 4,
        ("training", "note"): 5,
        ("data",): 8,
        ("data", "datasets"): 9,
        ("data", "datasets", 0): 10,
        ("data", "datasets", 0, "path"): 10,
        ("data", "datasets", 0, "weight"): 11,
        ("data", "datasets", 1): 13,
        ("data", "datasets", 1, "path"): 13,
        ("data", "mix"): 14,
        ("data", "mix", 0): 14,
        ("data", "mix", 1): 15,
    }


def test_where_names_file_and_line():
    assert load("a: 1\nb: 2", "f.yaml").where(("b",)) == "f.yaml:2"


def test_windows_line_ends_count_as_one_line():
    assert load(b"a: 1\r\nb: 2\r\n", "f.yaml").lines["b",] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: is empty"),
        ("# nothing\n", "f.yaml: is empty"),
        ("\ufeffa: 1", "f.yaml: starts with a byte order mark: save it as UTF-8 without BOM"),
        (b"a: 1\nb: \xff", "f.yaml:2: not UTF-8 (byte 0xff)"),
        ("a: 1\nb: \x07", "f.yaml:2: the character U+0007 is not allowed"),
        ("a: 1\nb: 2\na: 3", "f.yaml:3: duplicate key 'a' (first in line 1)"),
        ("x:\n  a: 1\n  a: 1", "f.yaml:3: duplicate key 'a' (first in line 2)"),
        ("a: 1\n3: b", "f.yaml:2: a key must be text (got 3; quote it)"),
        ("true: b", "f.yaml:1: a key must be text (got true; quote it)"),
        ("? [a]\n: b", "f.yaml:1: a key must be text (got a mapping, a list or an alias)"),
        ("a: &x 1\nb: *x", "f.yaml:2: aliases ('*') are not supported: write the value out"),
        ("a: 1\n<<: {b: 1}", "f.yaml:2: merge keys ('<<') are not supported"),
        ("a: !foo 1", "f.yaml:1: tags are not supported (found !foo)"),
        ("a: !!str 1", "f.yaml:1: tags are not supported (found tag:yaml.org,2002:str)"),
        ("a: 1\n---\nb: 2", "f.yaml:2: a second document ('---'): only one is read"),
        ("a: " + "9" * 5000, "f.yaml:1: a number of 5000 digits"),
        ("a: 0x" + "f" * 5000, "f.yaml:1: a number of 5002 digits"),
        (r'a: "\ud83d"', "f.yaml:1: half of a surrogate pair: write the character itself"),
        (r'a: "\UFFFFFFFF"', "f.yaml: an escape is beyond U+10FFFF"),
        ("a:\n\tb: 1", "f.yaml:2: not valid YAML: a tab where only spaces may stand"),
        ("a: 'x\nb: 1", "f.yaml:1: not valid YAML: a quote that is never closed"),
        ("a: [1\nb: 2", "f.yaml:2: not valid YAML: a missing ',' or ']'"),
        ("a: {b: 2", "f.yaml:1: not valid YAML: a missing ',' or '}'"),
        ("a: @b", "f.yaml:1: not valid YAML: text that starts with '@' must be quoted"),
        ("a: 1\nb\nc: 2", "f.yaml:2: not valid YAML: a key without ': value'"),
        (
            "a: b: c",
            "f.yaml:1: not valid YAML: a ':' out of place (quote the text, or indent the key)",
        ),
        (
            "- a\nb: 1",
            "f.yaml:2: not valid YAML: wrong indentation, or text after a closing quote",
        ),
        (r'a: "\q"', "f.yaml:1: not valid YAML: found unknown escape character 'q'"),
    ],
)
def test_unreadable_text_is_refused_with_its_line(text, message):
    with pytest.raises(UsageError) as caught:
        load(text, "f.yaml")
    assert str(caught.value) == message


def test_quoted_merge_key_is_an_ordinary_key():
    assert load("'<<': 1", "f.yaml").data == {"<<": 1}


def test_nesting_at_the_limit_is_read_and_beyond_refused():
    assert load("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH, "f.yaml").data
    with pytest.raises(UsageError, match=f"f.yaml:1: nested more than {MAX_DEPTH} levels deep"):
        load("[" * 100_000, "f.yaml")


def test_dump_is_readable_and_keeps_order():
    data = {
        "seed": 1,
        "learning_rate": 5e-7,
        "name": "no",
        "author": "Zoë",
        "empty": "",
        "none": None,
        "flag": True,
        "limit": math.inf,
        "template": "{{ a }}\n  b\n",
        "data": [{"path": "a/b", "weights": [1, 2]}],
        "nothing": {},
    }
    assert (
        dump(data)
        == """\
seed: 1
learning_rate: 5e-07
name: no
author: Zoë
empty: ''
none: null
flag: true
limit: .inf
template: |
  {{ a }}
    b
data:
- path: a/b
  weights:
  - 1
  - 2
nothing: {}
"""
    )


@pytest.mark.parametrize("text", ["null", "~", "True", "1e3", "0x10", "0o7", "0777", ".nan", "<<"])
def test_dump_text_that_reads_as_something_else_is_quoted(text):
    assert load(dump({"x": text, text: 1}), "f.yaml").data == {"x": text, text: 1}


def test_dump_shared_list_is_written_twice_without_alias():
    shared = [1]
    assert dump({"a": shared, "b": shared}) == "a:\n- 1\nb:\n- 1\n"


@pytest.mark.parametrize("data", [{1: "a"}, {"a": {1, 2}}, {"a": (1, 2)}, {"a": b"x"}, object()])
def test_dump_of_what_is_not_plain_data_is_refused(data):
    with pytest.raises(TypeError, match=r"a key must be text, not 1|not plain data: "):
        dump(data)
