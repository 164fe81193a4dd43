from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import (
    BaseModel,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from post_training.config.faults import OTHER_NAMES, describe, fields_at, paths_of_keys
from post_training.config.load import load_config
from post_training.config.model import Config
from post_training.core import yaml
from post_training.core.errors import ConfigError
from post_training.stages.registry import STAGES


class Sample(Config):
    kind: Literal["sample"]
    num_rows: PositiveInt


class Inner(Config):
    weight: PositiveFloat = 1.0
    warmup: float = Field(0.1, ge=0, le=1)

    @field_validator("weight")
    @classmethod
    def refuse_large(cls, weight: float) -> float:
        if weight > 5:
            raise ValueError(f"weights above 5 drown the rest (got {weight})")
        return weight

    @model_validator(mode="after")
    def compare(self) -> "Inner":
        if self.warmup > self.weight:
            raise ValueError("warmup must not exceed weight")
        return self


class Settings(Config):
    number: float = 0.0
    count: Annotated[int, Field(ge=2, lt=10)] = 2
    flag: bool = False
    text: Annotated[str, Field(pattern="^a+$", min_length=2)] = "aa"
    path: Path = Path("x")
    size: Literal["small", "large"] = "small"
    pair: tuple[int, int] = (1, 2)
    names: list[str] = Field(["a"], min_length=1, max_length=2)
    table: dict[str, float] = Field(default_factory=dict)
    steps: PositiveInt | Literal["auto"] = "auto"
    source: Inner | str | None = None
    one_or_more: str | list[str] = "a"
    transforms: list[Sample] = Field(default_factory=list)
    inner: Inner = Inner()


@pytest.fixture
def faults_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def faults(model, text):
        Path("f.yaml").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(model, Path("f.yaml"))
        return caught.value.faults

    return faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("number: abc", "number: must be a number (got 'abc')"),
        ("number: true", "number: must be a number (got true)"),
        ("number: .nan", "number: must be finite (got nan)"),
        ("number: 1e999", "number: must be finite (got inf)"),
        ("count: 0", "count: must be >= 2 (got 0)"),
        ("count: 10", "count: must be < 10 (got 10)"),
        ("count: 1e1", "count: must be an integer (got 10.0; write 10)"),
        ("flag: no", "flag: must be true or false (got 'no')"),
        ("flag: 1", "flag: must be true or false (got 1)"),
        ("text: 3", "text: must be a string (got 3)"),
        ("text: ab", "text: must be text that matches ^a+$ (got 'ab')"),
        ("text: a", "text: must have at least 2 characters (has 1)"),
        ("path: 3", "path: must be a string (got 3)"),
        ("size: smal", "size: must be 'small' or 'large' (got 'smal'), did you mean 'small'?"),
        ("size: 7", "size: must be 'small' or 'large' (got 7)"),
        ("pair: [1]", "pair[1]: missing"),
        ("pair: [1, a]", "pair[1]: must be an integer (got 'a')"),
        ("pair: [1, 2, 3]", "pair: must have at most 2 items (has 3)"),
        ("pair: 3", "pair: must be a list (got 3)"),
        ("names: []", "names: must have at least 1 items (has 0)"),
        ("names: [a, b, c]", "names: must have at most 2 items (has 3)"),
        ("names: a", "names: must be a list (got 'a')"),
        ("table: [1, 2]", "table: must be a mapping (got [1, 2])"),
        ("table: {a: b}", "table.a: must be a number (got 'b')"),
        ("inner: 3", "inner: must be a mapping (got 3)"),
        ("inner: {weight: 0}", "inner.weight: must be > 0 (got 0)"),
        ("inner: {warmup: 2}", "inner.warmup: must be <= 1 (got 2)"),
        ("inner: {weight: 6}", "inner.weight: weights above 5 drown the rest (got 6.0)"),
        ("inner: {weight: 0.05}", "inner: warmup must not exceed weight"),
        # unions: what the member that was meant says, else all kinds there are
        ("steps: -1", "steps: must be > 0 (got -1)"),
        ("steps: aut", "steps: must be an integer or 'auto' (got 'aut')"),
        ("source: 3", "source: must be a mapping or a string (got 3)"),
        ("source: {weight: 0}", "source.weight: must be > 0 (got 0)"),
        ("one_or_more: 3", "one_or_more: must be a string or a list (got 3)"),
        ("one_or_more: [3]", "one_or_more[0]: must be a string (got 3)"),
        # models in a list
        ("transforms: [{kind: sample}]", "transforms[0].num_rows: missing (an integer > 0)"),
        (
            "transforms: [{kind: sampel, num_rows: 1}]",
            "transforms[0].kind: must be 'sample' (got 'sampel'), did you mean 'sample'?",
        ),
        ("transforms: [3]", "transforms[0]: must be a mapping (got 3)"),
        (
            "transforms: [{kind: sample, num_rows: 1, num_row: 2}]",
            "transforms[0]: unknown key 'num_row', did you mean 'num_rows'?",
        ),
        (
            "transforms: [{kind: sample, num_rows: 1, zzz: 2}]",
            "transforms[0]: unknown key 'zzz' (known: kind, num_rows)",
        ),
    ],
)
def test_fault_is_told_in_plain_words(faults_of, text, fault):
    assert faults_of(Settings, text) == [f"f.yaml:1: {fault}"]


def test_long_value_is_cut(faults_of):
    assert faults_of(Settings, "number: " + "a" * 100) == [
        "f.yaml:1: number: must be a number (got '" + "a" * 59 + "...)"
    ]


class Section(Config):
    learning_rate: float = 0.1
    max_steps: Annotated[PositiveInt, Field(description="optimizer steps")]


class Other(Config):
    seed: int = 0
    learning_rate: float = 0.1


class Sampling(Config):
    n: PositiveInt = 10
    max_tokens: PositiveInt = 16


class Sections(Config):
    training: Section
    sampling: Other = Other()


class Stage(Config):
    """As a stage has them."""

    run_dir: Path | None = None
    seed: int = 0
    debug_subsample: int | None = None
    sampling: Sampling = Sampling()
    training: Section | None = None


def test_missing_key_is_named_with_its_type_and_without_its_description(faults_of):
    assert faults_of(Sections, "training: {}") == [
        "f.yaml: training.max_steps: missing (an integer > 0)"
    ]
    assert faults_of(Sections, "sampling: {}") == [
        "f.yaml: training: missing (a mapping with max_steps)"
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_step: 1", "unknown key 'max_step', did you mean 'training.max_steps'?"),
        ("seed: 1", "unknown key 'seed', did you mean 'sampling.seed'?"),
        (
            "learning_rate: 1",
            "unknown key 'learning_rate',"
            " did you mean 'training.learning_rate' or 'sampling.learning_rate'?",
        ),
        ("sampling: {lr: 1}", "sampling: unknown key 'lr', did you mean 'learning_rate'?"),
        ("sample: 1", "unknown key 'sample', did you mean 'sampling'?"),
        ("zzz: 1", "unknown key 'zzz' (known: training, sampling)"),
    ],
)
def test_unknown_key_offers_the_key_that_was_meant(faults_of, text, words):
    assert faults_of(Sections, f"training: {{max_steps: 1}}\n{text}") == [f"f.yaml:2: {words}"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # What other trainers call it.
        ("sampling: {num_samples: 4}", "sampling: unknown key 'num_samples', did you mean 'n'?"),
        ("max_new_tokens: 4", "unknown key 'max_new_tokens', did you mean 'sampling.max_tokens'?"),
        ("sampling: {output_dir: x}",
         "sampling: unknown key 'output_dir', did you mean 'run_dir' at the top level?"),
        ("gradient_accumulation_steps: 4",
         "unknown key 'gradient_accumulation_steps': set training.effective_batch_size: "
         "accumulation follows from it"),
        ("training: {tensor_parallel_size: 2, max_steps: 1}",
         "training: unknown key 'tensor_parallel_size': training does not spread a layer or its "
         "experts over processes; distributed.strategy: zero3 or fsdp2 divides the weights"),
        # Not where this section has none of that name.
        ("training: {epochs: 1, max_steps: 1}",
         "training: unknown key 'epochs' (known: learning_rate, max_steps)"),
        # The same word in another place says where; one that is far is none.
        ("sampling: {seed: 1}",
         "sampling: unknown key 'seed', did you mean 'seed' at the top level?"),
        ("sampling: {sub_sample: 1}",
         "sampling: unknown key 'sub_sample' (known: n, max_tokens)"),
        # Lines of a file that is no configuration are not shown.
        ('"root:$6$secret:20228:0": 1', "a key that is no setting's name"),
        ("training: fast", "training: must be a mapping with max_steps or null (got 'fast')"),
    ],
)  # fmt: skip
def test_unknown_key_is_explained_as_a_newcomer_writes_it(faults_of, text, words):
    assert faults_of(Stage, text) == [f"f.yaml:1: {words}"]


def test_known_keys_are_listed_only_when_they_are_few(faults_of):
    assert faults_of(Settings, "zzz: 1") == ["f.yaml:1: unknown key 'zzz'"]


class Fixed(Config):
    value: int

    @model_validator(mode="after")
    def refuse(self) -> "Fixed":
        raise ValueError("value and the rest contradict each other")


def test_fault_of_the_whole_names_the_file_alone(faults_of):
    assert faults_of(Fixed, "value: 1") == ["f.yaml: value and the rest contradict each other"]


class Unusual(Config):
    number: complex = 1j


def test_error_without_words_of_ours_keeps_those_of_pydantic(faults_of):
    (fault,) = faults_of(Unusual, "number: [1]")
    assert fault.startswith("f.yaml:1: number: input should be a valid python complex object")
    assert fault.endswith("(got [1])")


@pytest.mark.parametrize("value", [0.1, 1e-300, 5e-324, 1.7976931348623157e308, 0.1 + 0.2])
def test_number_passes_the_check_bit_by_bit(tmp_path, value):
    (tmp_path / "f.yaml").write_text(yaml.dump({"number": value}))
    assert load_config(Settings, tmp_path / "f.yaml").number == value


def test_other_names_stand_for_settings_that_a_stage_has():
    settings: set[str] = set()
    for stage in STAGES.values():
        for key, paths in paths_of_keys(stage.load_config_class(), but="").items():
            settings |= {key, *paths}
    assert [ours for ours in OTHER_NAMES.values() if " " not in ours and ours not in settings] == []


# What a model may hold at a path, and in which words that is said.


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


class Nested(BaseModel):
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
    assert list(fields_at(Nested, path)) == keys


def test_paths_of_keys_find_every_place_but_one():
    paths = paths_of_keys(Nested, but="source.path")
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
        ("ratio", "a number > 0 and <= 1"),
        ("optional", "a mapping or null"),
    ],
)
def test_describe_field_says_type_and_limits(key, words):
    assert describe(Nested.model_fields[key]) == words


@pytest.mark.parametrize(
    ("annotation", "words"),
    [(int, "an integer"), (bool, "true or false"), (str, "a string"), (Path, "a path")],
)
def test_describe_plain_type_uses_plain_words(annotation, words):
    model = type("Plain", (BaseModel,), {"__annotations__": {"x": annotation}})
    assert describe(model.model_fields["x"]) == words


def test_hint_says_what_the_wrong_settings_are(tmp_path):
    class Described(Config):
        size: int = Field(gt=0, description="Number of rows.")
        name: str = Field(description="What it is called.")
        other: int = Field(1, description="Not wrong.")

    file = tmp_path / "a.yaml"
    file.write_text("size: 0\n")
    with pytest.raises(ConfigError) as raised:
        load_config(Described, file)
    assert raised.value.hint == "size: Number of rows.\n      name: What it is called."
