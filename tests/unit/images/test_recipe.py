import os
import shutil
from pathlib import Path

import pytest

from post_training.core.errors import UsageError
from post_training.images.recipe import load_recipe

REPOSITORY = Path(__file__).parents[3]

BASE = "0" * 64
SETTINGS = 'platform = "linux/amd64"\npython = "3.11"\nglibc = "2.36"\n'


@pytest.fixture
def checkout(tmp_path) -> Path:
    files = {
        "containers/cpu/Dockerfile": "FROM scratch",
        "containers/cpu/requirements.lock": "six==1",
        "containers/cpu/recipe.toml": SETTINGS,
        "containers/cpu/README.md": "words",
        "containers/steps/install": "#!/bin/sh",
        "entrypoints/entrypoint": "#!/bin/sh",
        "pyproject.toml": "[project]",
        "src/post_training/cli.py": "pass",
    }
    for name, text in files.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def input_hash(checkout: Path, base: str = BASE) -> str:
    return load_recipe("cpu", checkout).input_hash(base)


def test_input_hash_is_of_contents_not_of_time_mode_or_place(checkout, tmp_path):
    expected = input_hash(checkout)
    shutil.copytree(checkout, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere/pyproject.toml", (0, 0))
    (tmp_path / "elsewhere/entrypoints/entrypoint").chmod(0o600)
    assert input_hash(tmp_path / "elsewhere") == expected


def test_input_hash_ignores_what_does_not_go_in(checkout):
    expected = input_hash(checkout)
    for name in (
        "containers/cpu/README.md",
        "src/post_training/__pycache__/cli.cpython-311.pyc",
        "src/post_training/.cli.py.swp",
        "src/post_training.egg-info/PKG-INFO",
        "README.md",
    ):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("changed")
    assert input_hash(checkout) == expected


@pytest.mark.parametrize(
    "name",
    [
        "containers/cpu/Dockerfile",
        "containers/cpu/requirements.lock",
        "containers/cpu/added.patch",
        "containers/steps/install",
        "entrypoints/entrypoint",
        "pyproject.toml",
        "src/post_training/cli.py",
        "src/post_training/data/chat/jinja/x.jinja",
    ],
)
def test_input_hash_changes_with_every_input(checkout, name):
    before = input_hash(checkout)
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).write_text("changed")
    assert input_hash(checkout) != before


def test_input_hash_changes_with_the_base_and_with_a_name(checkout):
    before = input_hash(checkout)
    assert input_hash(checkout, base="1" * 64) != before
    (checkout / "src/post_training/cli.py").rename(checkout / "src/post_training/cli2.py")
    assert input_hash(checkout) != before


def test_input_hash_over_an_image_of_ours_is_of_the_recipe_alone(checkout):
    """Our sources and programs are in the base, which base.lock names by its digest."""
    (checkout / "containers/cpu/recipe.toml").write_text(SETTINGS + 'base = "gh200"\n')
    before = input_hash(checkout)
    for name in ("src/post_training/cli.py", "entrypoints/entrypoint", "containers/cpu/base.lock"):
        (checkout / name).write_text("changed")
    assert input_hash(checkout) == before
    for name in ("containers/cpu/requirements.lock", "containers/steps/install"):
        now = input_hash(checkout)
        (checkout / name).write_text("changed")
        assert input_hash(checkout) != now
    assert input_hash(checkout, base="1" * 64) != input_hash(checkout)


def test_stage_copies_with_fixed_modes_and_returns_the_hash(checkout, tmp_path):
    (checkout / "entrypoints/entrypoint").chmod(0o600)
    context = tmp_path / "context"
    context.mkdir(mode=0o700)
    recipe = load_recipe("cpu", checkout)
    assert recipe.stage(context, BASE) == recipe.input_hash(BASE)
    modes = {
        path.relative_to(context).as_posix(): path.stat().st_mode & 0o777
        for path in [context, *context.rglob("*")]
    }
    assert modes.pop("entrypoints/entrypoint") == 0o755
    assert modes.pop("steps/install") == 0o755
    folders = {".", "entrypoints", "steps", "project", "project/src", "project/src/post_training"}
    assert {name for name, mode in modes.items() if mode == 0o755} == folders
    assert {modes[name] for name in modes.keys() - folders} == {0o644}


def test_load_recipe_unknown_name_lists_the_known(checkout):
    with pytest.raises(UsageError, match=r"no container recipe 'gpu'\nhint: there are: cpu"):
        load_recipe("gpu", checkout)


@pytest.mark.parametrize(
    "command",
    [
        "image build",
        "image push-sqsh",
        "image lock",
        "image lock-tools",
        "image context cpu folder",
        "image gc .",
        "edf render",
    ],
)
def test_command_outside_a_checkout_says_what_to_type(post_training, tmp_path, command):
    done = post_training(*command.split(), POST_TRAINING_IMAGE_STORE=str(tmp_path / "store"))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tmp_path}: not a checkout of post-training\n"
        f"hint: run it in a checkout, or name one: --repository {REPOSITORY}\n"
    )
