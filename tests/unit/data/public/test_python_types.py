"""Types in Python's notation, to JSON Schema."""

from typing import Any

import pytest

from post_training.data.public.python_types import parse_type


@pytest.mark.parametrize(
    ("written", "schema", "may_be_left_out"),
    [
        ("str", {"type": "string"}, False),
        ("int, optional", {"type": "integer"}, True),
        ("str, optional, default='a, b'", {"type": "string"}, True),
        ("Optional[int]", {"type": "integer"}, True),
        (
            "List[List[int]]",
            {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            False,
        ),
        ("Dict[str, float]", {"type": "object", "additionalProperties": {"type": "number"}}, False),
        ("Dict[str, Any], optional", {"type": "object"}, True),
        ("Tuple[int, ...]", {"type": "array", "items": {"type": "integer"}}, False),
        ("set", {"type": "array"}, False),
        (
            "List[Union[int, str]]",
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
            False,
        ),
        ("int | None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, False),
        ("Literal['a', 'b']", {"enum": ["a", "b"]}, False),
        ("typing.Any", {}, False),
    ],
)
def test_types_of_python_keep_all_that_they_say(
    written: str, schema: dict[str, Any], may_be_left_out: bool
):
    assert parse_type(written) == (schema, may_be_left_out)


@pytest.mark.parametrize("written", ["Callable[[float], float]", "np.ndarray", "", "List[", "1"])
def test_types_without_values_in_json_have_no_schema(written: str):
    assert parse_type(written) is None
