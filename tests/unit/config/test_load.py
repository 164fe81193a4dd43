import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt

from post_training.config import load as config_load
from post_training.config.load import MAX_LEVELS, load_config, merge, read_layer, resolved_yaml
from post_training.config.model import Config, Role
from post_training.core.errors import ConfigError


class Dataset(Config):
    path: Annotated[Path, Role.INPUT]
    weight: PositiveFloat = 1.0


class Training(Config):
    learning_rate: PositiveFloat = 0.001
    max_steps: PositiveInt = 10
    betas: tuple[float, float] = (0.9, 0.999)
    loss: Literal["dpo", "ipo"] = "dpo"
    rule: Literal["mean", "sum"] = "mean"
    note: str | None = None


class Run(Config):
    training: Training = Training()
    datasets: list[Dataset] = Field(default_factory=list)
    seed: int = 0


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    monkeypatch.setattr(config_load, "PRESETS_DIR", Path("presets"))
    return tmp_path


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    return Path(path)


def load(path, *overrides):
    return load_config(Run, Path(path), overrides)


def faults_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.faults


def test_load_gives_the_configuration_with_its_defaults():
    text = "training:\n  learning_rate: 5e-7\ndatasets:\n- path: a/b\n"
    assert load(write("run.yaml", text)) == Run(
        training=Training(learning_rate=5e-7), datasets=[Dataset(path=Path("a/b"))]
    )
    data = {"training": {"learning_rate": 5e-7}, "datasets": [{"path": "a/b"}]}
    assert read_layer(Path("run.yaml")).data == data


def test_load_takes_text_for_paths_lists_for_tuples_and_integers_for_numbers():
    write("run.yaml", "training: {loss: ipo, betas: [0, 1], learning_rate: 1}\n")
    training = load("run.yaml").training
    assert training.loss == "ipo"
    assert training.betas == (0.0, 1.0)
    assert training.learning_rate == 1.0
    assert isinstance(training.learning_rate, float)


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("seed: '3'", "run.yaml:1: seed: must be an integer (got '3')"),
        ("seed: 3.0", "run.yaml:1: seed: must be an integer (got 3.0; write 3)"),
        ("seed: 3.5", "run.yaml:1: seed: must be an integer (got 3.5)"),
        ("seed: true", "run.yaml:1: seed: must be an integer (got true)"),
        ("seed:", "run.yaml:1: seed: must be an integer (got null)"),
        ("training: 3", "run.yaml:1: training: must be a mapping (got 3)"),
    ],
)
def test_load_value_of_another_type_is_refused(setting, fault):
    write("run.yaml", setting)
    assert faults_of("run.yaml") == [fault]


def test_load_tells_every_fault_with_the_line_it_was_written_in():
    write(
        "run.yaml",
        """\
training:
  learning_rate: -1
  lerning_rate: 1
  rule: sun
datasets:
  - path: a
  - weight: 0
seeds: 1
""",
    )
    assert faults_of("run.yaml", "training.max_steps=0", "training.loss=kto") == [
        "run.yaml:2: training.learning_rate: must be > 0 (got -1)",
        "override 'training.max_steps=0': training.max_steps: must be > 0 (got 0)",
        "override 'training.loss=kto': training.loss: must be 'dpo' or 'ipo' (got 'kto')",
        "run.yaml:4: training.rule: must be 'mean' or 'sum' (got 'sun'), did you mean 'sum'?",
        "run.yaml:3: training: unknown key 'lerning_rate', did you mean 'learning_rate'?",
        "run.yaml:7: datasets[1].path: missing (a path)",
        "run.yaml:7: datasets[1].weight: must be > 0 (got 0)",
        "run.yaml:8: unknown key 'seeds', did you mean 'seed'?",
    ]


def test_override_of_a_section_hides_the_lines_below_it():
    write("run.yaml", "training:\n  max_steps: 1\n")
    assert faults_of("run.yaml", "training={max_steps: 0}") == [
        "override 'training={max_steps: 0}': training.max_steps: must be > 0 (got 0)"
    ]


def test_override_of_a_misspelt_section_is_named():
    write("run.yaml", "seed: 1")
    assert faults_of("run.yaml", "trainin.max_steps=1") == [
        "override 'trainin.max_steps=1': unknown key 'trainin', did you mean 'training'?"
    ]


def test_overrides_apply_in_order_after_the_file():
    write("run.yaml", "seed: 1\ndatasets: [{path: a}]")
    config = load("run.yaml", "seed=2", "seed=3", "datasets[1].path=b")
    assert config.seed == 3
    assert [dataset.path for dataset in config.datasets] == [Path("a"), Path("b")]


def test_malformed_overrides_are_all_told():
    write("run.yaml", "seed: 1")
    assert faults_of("run.yaml", "seed", "seed.x=1", "x..y=1") == [
        "override 'seed': has no value (write key=value)",
        "override 'seed.x=1': seed is 1, not a mapping",
        "override 'x..y=1': an empty name in 'x..y'",
    ]


def test_extends_merges_in_order_and_the_file_comes_last():
    write("shared/a.yaml", "seed: 1\ntraining: {max_steps: 1, note: a}\ndatasets: [{path: a}]")
    write("shared/b.yaml", "seed: 2\ntraining: {max_steps: 2}")
    write("presets/small.yaml", "training: {rule: sum}")
    write(
        "jobs/run.yaml",
        "extends: [../shared/a.yaml, ../shared/b.yaml, preset:small]\n"
        "training: {learning_rate: 3}\ndatasets: [{path: c}]",
    )
    assert read_layer(Path("jobs/run.yaml")).data == {
        "seed": 2,
        "training": {"max_steps": 2, "note": "a", "rule": "sum", "learning_rate": 3},
        "datasets": [{"path": "c"}],
    }


def test_extends_one_file_twice_is_no_circle():
    write("base.yaml", "seed: 1")
    write("a.yaml", "extends: base.yaml\n")
    write("b.yaml", "extends: base.yaml\n")
    write("run.yaml", "extends: [a.yaml, b.yaml]")
    assert load("run.yaml").seed == 1


def test_extends_fault_names_the_file_that_wrote_the_value():
    write("shared/base.yaml", "seed: 1\ntraining:\n  max_steps: 0\n  learning_rate: 0\n")
    write("presets/small.yaml", "datasets:\n  - path: 3\n")
    write("run.yaml", "extends: [shared/base.yaml, preset:small]\ntraining: {learning_rate: -1}")
    assert faults_of("run.yaml") == [
        "run.yaml:2: training.learning_rate: must be > 0 (got -1)",
        "shared/base.yaml:3: training.max_steps: must be > 0 (got 0)",
        "preset:small:2: datasets[0].path: must be a string (got 3)",
    ]


def test_extends_null_replaces_a_section():
    write("base.yaml", "training: {max_steps: 2}")
    write("run.yaml", "extends: base.yaml\ntraining:\n")
    assert faults_of("run.yaml") == ["run.yaml:2: training: must be a mapping (got null)"]


@pytest.mark.parametrize(
    ("extends", "fault"),
    [
        ("[nowhere.yaml]", "run.yaml:2: extends: no such file: nowhere.yaml"),
        ("preset:smal", "run.yaml:2: extends: no preset 'smal', did you mean 'small'?"),
        ("preset:zzz", "run.yaml:2: extends: no preset 'zzz'; known: small"),
        ("preset:../run", "run.yaml:2: extends: no preset '../run'; known: small"),
        ("[base.yaml, 3]", "run.yaml:2: extends: must be a file or preset:name (got 3)"),
        ("{a: b}", "run.yaml:2: extends: must be a file or preset:name (got {a: 'b'})"),
        ("", "run.yaml:2: extends: must be a file or preset:name (got null)"),
    ],
)
def test_extends_of_what_is_not_there_is_refused(extends, fault):
    write("presets/small.yaml", "seed: 1")
    write("base.yaml", "seed: 1")
    write("run.yaml", f"seed: 1\nextends: {extends}")
    assert faults_of("run.yaml") == [fault]


def test_extends_in_a_circle_is_refused_naming_the_chain():
    write("a.yaml", "extends: sub/b.yaml")
    write("sub/b.yaml", "seed: 1\nextends:\n- ../a.yaml")
    chain = "a.yaml -> sub/b.yaml -> sub/../a.yaml"
    assert faults_of("a.yaml") == [f"sub/b.yaml:3: extends: goes in a circle: {chain}"]


def test_extends_at_the_deepest_level_is_read_and_beyond_refused():
    for level in range(MAX_LEVELS + 1):
        write(f"{level}.yaml", f"extends: {level + 1}.yaml")
    write(f"{MAX_LEVELS + 1}.yaml", "seed: 7")
    assert load("1.yaml").seed == 7
    (fault,) = faults_of("0.yaml")
    assert fault.startswith(f"{MAX_LEVELS}.yaml:1: extends: more than 10 levels: 0.yaml -> 1.yaml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("- a", "run.yaml: must be a mapping at the top level"),
        ("seed", "run.yaml: must be a mapping at the top level"),
        ("", "run.yaml: is empty"),
        ("seed: 1\nseed: 2", "run.yaml:2: duplicate key 'seed' (first in line 1)"),
    ],
)
def test_load_of_a_file_that_holds_no_settings_is_refused(text, fault):
    write("run.yaml", text)
    assert faults_of("run.yaml") == [fault]


def test_load_of_no_file_is_refused():
    assert faults_of("cfg.yaml") == ["cfg.yaml: no such file"]
    assert faults_of("presets") == ["presets: is a folder, not a file"]


def test_load_value_that_no_library_and_no_file_system_takes_is_refused():
    write("run.yaml", f'seed: 7\ntraining: {{max_steps: {2**63}, note: "a\\0b"}}\n')
    assert faults_of("run.yaml") == [
        f"run.yaml:2: training.max_steps: must be <= {2**63 - 1} (got {2**63})",
        r"run.yaml:2: training.note: holds a NUL character (got 'a\x00b')",
    ]


def test_resolved_yaml_writes_defaults_and_loads_equal():
    write("run.yaml", "training: {loss: ipo, note: 'no'}\ndatasets: [{path: a}]")
    config = load("run.yaml")
    text = resolved_yaml(config)
    assert "  max_steps: 10\n" in text
    assert load(write("resolved.yaml", text)) == config


def test_merge_replaces_lists_and_scalars_and_merges_mappings():
    base = {"a": {"b": 1, "c": {"d": 1}}, "list": [1, 2], "x": {"y": 1}}
    top = {"a": {"c": {"e": 2}}, "list": [3], "x": 1, "new": {}}
    assert merge(base, top) == {
        "a": {"b": 1, "c": {"d": 1, "e": 2}},
        "list": [3],
        "x": 1,
        "new": {},
    }


def test_import_brings_no_training_stack_and_no_screen_library():
    code = "import sys, post_training.config.load, post_training.config.model; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "pydantic" in modules
    assert not {"typer", "rich", "click", "torch", "numpy"} & set(modules)


def test_load_secret_is_refused_before_all_else_and_never_shown():
    token, address = "ghp_" + 36 * "a", "https://me:" + "word@example.org"
    write(
        "run.yaml", f"training:\n  note: {address}\nseed: wrong\ndatasets: [{{path: /x/{token}}}]\n"
    )
    faults = faults_of("run.yaml", f"training.rule={token}")
    assert faults == [
        "run.yaml:2: training.note: holds a secret (password in an address)",
        "override 'training.rule=[redacted: GitHub token]': training.rule: holds a secret "
        "(GitHub token)",
        "run.yaml:4: datasets[0].path: holds a secret (GitHub token)",
    ]
