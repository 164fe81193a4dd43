import pytest

from post_training.records.first_difference import first_tensor_difference, natural_order


@pytest.fixture
def difference(tmp_path, write_tensors):
    def find(one, other):
        return first_tensor_difference(
            write_tensors(tmp_path / "one", **one), write_tensors(tmp_path / "other", **other)
        )

    return find


def test_tensors_in_another_order_are_equal(difference):
    a, b = ("F32", [2], [1.0, 2.0]), ("I64", [1, 2], [3, 4])
    assert difference({"a": a, "b": b}, {"b": b, "a": a}) is None


def test_tensors_first_is_the_first_layer_and_the_first_element(difference):
    equal, changed = ("F32", [2, 2], [0.0, 1.0, 2.0, 3.0]), ("F32", [2, 2], [0.0, 1.0, 2.5, 9.0])
    one = {"layers.10.weight": equal, "layers.9.weight": equal, "layers.2.weight": equal}
    other = {**one, "layers.10.weight": changed, "layers.9.weight": changed}
    assert difference(one, other) == (
        "layers.9.weight (first of 2 tensors): element 2 is 2.0, then 2.5"
    )


@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        (("BF16", [2], [0x3F80, 0x3F80]), ("BF16", [2], [0x3F80, 0x3F81]),
         "w: element 1 is 1.0, then 1.0078125"),
        (("F32", [1], [0.0]), ("F32", [1], [-0.0]), "w: element 0 is 0.0, then -0.0"),
        (("BOOL", [1], [True]), ("BOOL", [1], [False]), "w: element 0 is 0x01, then 0x00"),
        (("F32", [1, 2], [1, 2]), ("F32", [2, 1], [1, 2]), "w: shape is [1, 2], then [2, 1]"),
        (("F32", [1], [1]), ("I64", [1], [1]), "w: dtype is F32, then I64"),
    ],
)  # fmt: skip
def test_tensors_difference_is_told_in_values(difference, one, other, text):
    assert difference({"w": one}, {"w": other}) == text


def test_tensors_missing_one_is_named(difference):
    weight = ("F32", [1], [1.0])
    assert difference({"w": weight, "v": weight}, {"w": weight}) == ("v: is there, then absent")


def test_natural_order_counts():
    names = ["checkpoint-20", "checkpoint-100", "checkpoint-3/b", "checkpoint-3/a"]
    assert sorted(names, key=natural_order) == [
        "checkpoint-3/a",
        "checkpoint-3/b",
        "checkpoint-20",
        "checkpoint-100",
    ]
