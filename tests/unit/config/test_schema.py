from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field, NonNegativeFloat

from post_training.config.faults import describe, fields_at, paths_of_keys


class Local(BaseModel):
    kind: Literal["local"]
    path: Path


class Hub(BaseModel):
    kind: Literal["hub", "mirror"]
    revision: str


class Leaf(BaseModel):
    name: str = ""


class Node(BaseModel):
    name: str = ""
    children: list[Leaf] = Field(default_factory=list)


class Model(BaseModel):
    source: Local
    sources: list[Hub] = Field(default_factory=list)
    by_name: dict[str, Local] = Field(default_factory=dict)
    pair: tuple[Local, Hub] | None = None
    tree: Node = Node()
    precision: Literal["bf16", "fp32"] = "bf16"
    ratio: Annotated[float, Field(gt=0, le=1, description="share of rows")] = 1.0
    floor: NonNegativeFloat | None = None
    counts: dict[str, int] = Field(default_factory=dict)
    names: list[str] = Field(default_factory=list)
    optional: Node | None = None


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (("source",), ["kind", "path"]),
        (("sources", 3), ["kind", "revision"]),
        (("by_name", "x"), ["kind", "path"]),
        (("pair", 0), ["kind", "path"]),
        (("pair", 1), ["kind", "revision"]),
        (("tree", "children", 0), ["name"]),
        (("optional",), ["name", "children"]),
        (("sources", "kind"), []),
        (("precision",), []),
        (("counts", "x"), []),
        (("nowhere", "x"), []),
    ],
)
def test_fields_at_path_are_those_of_the_model_there(path, keys):
    assert list(fields_at(Model, path)) == keys


def test_paths_of_keys_find_every_place_but_one():
    paths = paths_of_keys(Model, but="source.path")
    assert paths["path"] == ["by_name[].path", "pair[].path"]
    assert paths["name"] == [
        "tree.name",
        "tree.children[].name",
        "optional.name",
        "optional.children[].name",
    ]
    assert paths["ratio"] == ["ratio"]


def test_describe_choice_lists_the_values():
    assert describe(Hub.model_fields["kind"]) == "one of 'hub', 'mirror'"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("source", "a mapping with kind, path"),
        ("sources", "a list"),
        ("counts", "a mapping"),
        ("tree", "a mapping"),
        ("precision", "one of 'bf16', 'fp32'"),
        ("ratio", "a number > 0 <= 1"),
        ("optional", "a mapping or null"),
    ],
)
def test_describe_field_says_type_and_limits(key, words):
    assert describe(Model.model_fields[key]) == words


@pytest.mark.parametrize(
    ("annotation", "words"),
    [(int, "an integer"), (bool, "true or false"), (str, "a string"), (Path, "a path")],
)
def test_describe_plain_type_uses_plain_words(annotation, words):
    model = type("Plain", (BaseModel,), {"__annotations__": {"x": annotation}})
    assert describe(model.model_fields["x"]) == words
