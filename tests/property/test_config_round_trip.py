from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, PositiveInt

from post_training.config.load import load_config, resolved_yaml
from post_training.config.model import Config
from post_training.core import yaml
from post_training.core.errors import ConfigError


class Filter(Config):
    kind: Literal["filter"]
    column: str


class Sample(Config):
    kind: Literal["sample"]
    share: Annotated[float, Field(gt=0, le=1)]
    seed: int | None = None


class Settings(Config):
    rate: float = 1.0
    steps: PositiveInt | Literal["auto"] = "auto"
    pair: tuple[int, str] = (1, "a")
    table: dict[str, float | list[str]] = Field(default_factory=dict)
    steps_of: list[Annotated[Filter | Sample, Field(discriminator="kind")]] = Field(
        default_factory=list
    )
    inner: Filter | Sample | str | None = None
    path: Path = Path("x")


finite = st.floats(allow_nan=False, allow_infinity=False)
# Integers beyond 64 bits and NUL characters are refused.
integers = st.integers(-(2**63) + 1, 2**63 - 1)
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
filters = st.builds(Filter, kind=st.just("filter"), column=text)
samples = st.builds(
    Sample,
    kind=st.just("sample"),
    share=st.floats(0, 1, exclude_min=True),
    seed=st.none() | integers,
)
settings = st.builds(
    Settings,
    rate=finite,
    steps=integers.map(lambda number: abs(number) or 1) | st.just("auto"),
    pair=st.tuples(integers, text),
    table=st.dictionaries(text, finite | st.lists(text, max_size=3), max_size=3),
    steps_of=st.lists(filters | samples, max_size=3),
    inner=filters | samples | st.none() | text,
    path=st.text(alphabet="abc./ ", min_size=1).map(Path),
)

keys = st.sampled_from([*Settings.model_fields, *Sample.model_fields, "column", "rat", "x"])
values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values |= st.sampled_from(["filter", "sample", "auto"])
anything = st.recursive(
    values,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=4),
    max_leaves=10,
)


def load(text):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "f.yaml"
        path.write_text(text, encoding="utf-8", newline="")
        return load_config(Settings, path)


def faults_of(text):
    try:
        load(text)
    except ConfigError as error:
        return error.faults
    return []


@given(settings)
def test_resolved_config_loads_equal(config):
    assert load(resolved_yaml(config)) == config


@given(st.dictionaries(keys, anything, max_size=5))
def test_any_data_is_loaded_or_refused_one_line_a_fault(data):
    for fault in faults_of(yaml.dump(data)):
        assert "f.yaml:" in fault
        assert "\n" not in fault
