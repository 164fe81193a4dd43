import copy

from hypothesis import given
from hypothesis import strategies as st

from post_training.config.load import merge

names = st.sampled_from("abc")
leaves = st.integers() | st.none() | st.lists(st.integers(), max_size=2)
mappings = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda below: st.dictionaries(names, leaves | below, max_size=3),
    max_leaves=8,
)
# Sections are capital, leaves small: in these no mapping meets a scalar, as in real configurations.
typed = st.recursive(
    st.dictionaries(names, leaves, max_size=3),
    lambda below: st.dictionaries(st.sampled_from("ABC"), below, max_size=3),
    max_leaves=8,
)


def paths_of(data, path=()):
    """{path: leaf}; an empty mapping counts as a leaf."""
    if not isinstance(data, dict) or (path and not data):
        return {path: data}
    found = {}
    for key, value in data.items():
        found |= paths_of(value, (*path, key))
    return found


@given(mappings, mappings)
def test_merge_holds_all_of_the_top_and_the_rest_of_the_base(base, top):
    merged, above = paths_of(merge(base, top)), paths_of(top)
    for path, leaf in above.items():
        assert leaf == {} or merged[path] == leaf
    for path, leaf in paths_of(base).items():
        replaced = any(path[: len(over)] == over[: len(path)] for over in above)
        assert replaced or merged[path] == leaf


@given(mappings)
def test_merge_with_nothing_or_itself_changes_nothing(data):
    assert merge(data, {}) == merge({}, data) == merge(data, data) == data


@given(typed, typed, typed)
def test_merge_of_like_kinds_groups_either_way(first, second, third):
    assert merge(merge(first, second), third) == merge(first, merge(second, third))


@given(mappings, mappings)
def test_merge_leaves_its_arguments_alone(base, top):
    before = copy.deepcopy((base, top))
    merge(base, top)
    assert (base, top) == before
