import copy
import string

from hypothesis import given
from hypothesis import strategies as st

from post_training.config.load import parse_override, set_override
from post_training.core.errors import dotted
from post_training.core.yaml import dump

names = st.text(alphabet=string.ascii_letters + "_-", min_size=1, max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(names, scalars, max_size=3)
sections = st.dictionaries(names, st.dictionaries(names, scalars, max_size=3), max_size=3)


def read(data, path):
    for part in path:
        data = data[part]
    return data


@given(sections, st.lists(names, min_size=1, max_size=4), values)
def test_set_value_reads_back(data, path, value):
    """Sections are mappings of scalars: a path of one or of new names can always be set."""
    path = [f"new_{path[0]}", *path[1:]]
    before = copy.deepcopy(data)
    override = parse_override(f"{dotted(tuple(path))}={dump(value)}")
    set_override(data, override)
    assert read(data, path) == value
    assert {key: data[key] for key in before} == before


@given(st.lists(scalars, max_size=4), scalars, st.data())
def test_set_item_changes_that_item_only(items, value, draw):
    index = draw.draw(st.integers(0, len(items)))
    data = {"items": list(items)}
    set_override(data, parse_override(f"items[{index}]={dump(value)}"))
    assert data["items"] == [*items[:index], value, *items[index + 1 :]]
