import pytest

from post_training.config.load import parse_override, set_override
from post_training.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("lr=5e-7", ("lr",), 5e-7),
        ("name=no", ("name",), "no"),
        ("limit=12:30:00", ("limit",), "12:30:00"),
        ("x=null", ("x",), None),
        ('x=""', ("x",), ""),
        ("x=[1, 2]", ("x",), [1, 2]),
        ("x={a: 1}", ("x",), {"a": 1}),
        ("x=a=b", ("x",), "a=b"),
        ("training.lr=1", ("training", "lr"), 1),
        ("data.datasets[0].path=a b", ("data", "datasets", 0, "path"), "a b"),
        ("grid[1][12]=x", ("grid", 1, 12), "x"),
        ("env.NCCL-X_1=0", ("env", "NCCL-X_1"), 0),
    ],
)
def test_override_is_a_path_and_a_yaml_value(text, path, value):
    override = parse_override(text)
    assert (override.path, override.value) == (path, value)
    assert type(override.value) is type(value)
    assert override.where == f"override {text!r}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "override 'lr': has no value (write key=value)"),
        ("=3", "override '=3': has no key (write key=value)"),
        (
            "x=",
            """override 'x=': has no value (write 'x=null' for nothing, 'x=""' for empty text)""",
        ),
        ("x..y=3", "override 'x..y=3': an empty name in 'x..y'"),
        (".x=3", "override '.x=3': an empty name in '.x'"),
        ("x.=3", "override 'x.=3': an empty name in 'x.'"),
        ("x[a]=3", "override 'x[a]=3': 'x[a]' is not a key (write section.list[0].name)"),
        ("x[-1]=3", "override 'x[-1]=3': 'x[-1]' is not a key (write section.list[0].name)"),
        ("[0]=3", "override '[0]=3': '[0]' is not a key (write section.list[0].name)"),
        ("x =3", "override 'x =3': 'x ' is not a key (write section.list[0].name)"),
        ("x=[1", "override 'x=[1': not valid YAML: a missing ',' or ']'"),
        ("x=*a", "override 'x=*a': aliases ('*') are not supported: write the value out"),
        ("x=#a", "override 'x=#a': is empty"),
    ],
)
def test_malformed_override_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        parse_override(text)
    assert str(caught.value) == message


def test_long_override_is_cut_in_messages():
    assert parse_override("x=" + "a" * 200).where == "override 'x=" + "a" * 57 + "..."


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=2", {"a": {"b": 2, "c": 0}, "items": [{"n": 1}]}),
        ("a={d: 1}", {"a": {"d": 1}, "items": [{"n": 1}]}),
        ("a=2", {"a": 2, "items": [{"n": 1}]}),
        ("new.deep.x=1", {"a": {"b": 1, "c": 0}, "items": [{"n": 1}], "new": {"deep": {"x": 1}}}),
        ("items[0].n=2", {"a": {"b": 1, "c": 0}, "items": [{"n": 2}]}),
        ("items[1].n=2", {"a": {"b": 1, "c": 0}, "items": [{"n": 1}, {"n": 2}]}),
        ("items[0]=x", {"a": {"b": 1, "c": 0}, "items": ["x"]}),
        ("items[1]=x", {"a": {"b": 1, "c": 0}, "items": [{"n": 1}, "x"]}),
        ("new[0][0].n=2", {"a": {"b": 1, "c": 0}, "items": [{"n": 1}], "new": [[{"n": 2}]]}),
    ],
)
def test_override_sets_its_key_and_leaves_the_others(override, expected):
    data = {"a": {"b": 1, "c": 0}, "items": [{"n": 1}]}
    set_override(data, parse_override(override))
    assert data == expected


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("a.b.c=1", "a.b is 1, not a mapping"),
        ("a.none.c=1", "a.none is null, not a mapping"),
        ("items.n=1", "items is a list (write its index: [0]), not a mapping"),
        ("items[2].n=1", "items has 1 item: index 2 is beyond its end"),
        ("items[2]=1", "items has 1 item: index 2 is beyond its end"),
        ("new[1]=1", "new has 0 items: index 1 is beyond its end"),
        ("a[0]=1", "a is a mapping, not a list"),
        ("a.b[0]=1", "a.b is 1, not a list"),
    ],
)
def test_override_through_what_cannot_hold_it_is_refused(override, problem):
    data = {"a": {"b": 1, "none": None}, "items": [{"n": 1}]}
    with pytest.raises(UsageError) as caught:
        set_override(data, parse_override(override))
    assert str(caught.value) == f"override {override!r}: {problem}"
