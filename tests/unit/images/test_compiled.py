"""Packages that are compiled on a node: the lock, the wheel in the store, what is refused."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import write_json
from post_training.core.hashing import sha256_file
from post_training.images.base import ensure_wheels
from post_training.images.compiled import (
    CompiledPackage,
    check_compilable,
    default_jobs,
    link_compiled,
    lock_text,
    read_compiled,
)
from post_training.images.recipe import Recipe, load_recipe
from post_training.images.selfcheck import compiled_modules
from post_training.images.store import ImageStore

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "containers/flash-attn/compile"
SETTINGS = 'platform = "{}"\npython = "3.11"\nglibc = "2.36"\n'
HERE, ELSEWHERE = "linux/amd64", "linux/arm64"
if os.uname().machine == "aarch64":
    HERE, ELSEWHERE = ELSEWHERE, HERE
# Shows what it was called with and a line of ninja's; its wheel is the source's file `word`.
FAKE_PIP = """#!/bin/sh
printf '%s\\n' "$FLASH_ATTENTION_FORCE_BUILD $FLASH_ATTN_CUDA_ARCHS $NVCC_THREADS $MAX_JOBS"
echo '  [1/73] /usr/local/cuda/bin/nvcc --options -c /tmp/flash_fwd.cu -o /tmp/flash_fwd.o -O3'
while [ "$1" != --wheel-dir ]; do shift; done
cp "$3/word" "$2/flash_attn-1-py3-none-any.whl"
exit "$CODE"
"""


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """One that takes compiled packages, and asks for none."""
    return make_recipe(tmp_path, HERE)


def make_recipe(repository: Path, platform: str) -> Recipe:
    files = {
        "tiny/Dockerfile": "FROM scratch",
        "tiny/recipe.toml": SETTINGS.format(platform),
        "tiny/requirements.lock": "",
        "tiny/compiled.lock": lock_text([]),
        "some/compile": "",
        "some/source.lock": "",
    }
    for name, text in files.items():
        path = repository / "containers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (repository / "pyproject.toml").write_text("")
    return load_recipe("tiny", repository)


@pytest.fixture
def store(tmp_path) -> ImageStore:
    return ImageStore(tmp_path / "store")


@pytest.fixture
def wheel(recipe, store) -> Path:
    """A wheel in the store that was compiled for the recipe, which names it."""
    made = recipe.repository / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("some.py", "")
    sha256 = sha256_file(made)
    kept = store.folder / f"compiled/sha256-{sha256}"
    kept.mkdir(parents=True)
    write_json(
        kept / "compiled.json",
        {
            "schema": "post-training/compiled-wheel/1",
            "lock_sha256": {"requirements.lock": sha256_file(recipe.locks["requirements.lock"])},
        },
    )
    entry = CompiledPackage("some", "1.0", sha256)
    (recipe.folder / "compiled.lock").write_text(lock_text([entry]))
    return made.rename(kept / made.name)


def linked(recipe: Recipe, store: ImageStore) -> list[str]:
    target = recipe.repository / "linked"
    target.mkdir()
    link_compiled(recipe, target, store)
    return sorted(path.name for path in target.iterdir())


def test_recipe_of_gh200_names_no_compiled_package():
    """As built and released here; a node adds them."""
    assert (REPOSITORY / "containers/gh200/compiled.lock").read_text() == lock_text([])


def test_lock_that_is_written_is_read(recipe):
    packages = [CompiledPackage("a-b", "1.0.post2", "1" * 64), CompiledPackage("c", "2", "2" * 64)]
    (recipe.folder / "compiled.lock").write_text(lock_text(packages[::-1]))
    assert read_compiled(recipe) == packages


@pytest.mark.parametrize("line", ["some==1.0", "some>=1.0 \\\n    --hash=sha256:" + "1" * 64])
def test_lock_with_another_line_is_refused(recipe, line):
    (recipe.folder / "compiled.lock").write_text(lock_text([]) + line + "\n")
    with pytest.raises(UsageError, match="not an entry of `image compile`: some"):
        read_compiled(recipe)


def test_recipe_without_the_file_has_no_compiled_package():
    assert read_compiled(load_recipe("cpu", REPOSITORY)) == []


def test_wheels_of_a_build_have_the_compiled_one(recipe, store, wheel):
    [found] = ensure_wheels(recipe, store).iterdir()
    assert (found.name, sha256_file(found)) == (wheel.name, sha256_file(wheel))


def test_input_hash_depends_on_the_compiled_wheel(recipe):
    before = recipe.input_hash("1" * 64)
    entry = CompiledPackage("some", "1.0", "2" * 64)
    (recipe.folder / "compiled.lock").write_text(lock_text([entry]))
    assert recipe.input_hash("1" * 64) != before


def test_wheel_that_is_not_in_the_store_is_named_with_what_to_do(recipe, store, wheel):
    wheel.unlink()
    with pytest.raises(PostTrainingError) as error:
        linked(recipe, store)
    assert error.value.problem == f"its wheel of some is not in the image store: {wheel.parent}"
    assert "`post-training image compile some`" in error.value.hint


def test_wheel_of_other_bytes_is_refused(recipe, store, wheel):
    assert linked(recipe, store) == [wheel.name]
    (recipe.repository / "linked" / wheel.name).unlink()
    (recipe.repository / "linked").rmdir()
    wheel.write_bytes(b"damaged")
    with pytest.raises(PostTrainingError, match=r"its sha256 is .*, compiled\.lock has"):
        linked(recipe, store)


def test_wheel_that_was_compiled_for_other_packages_is_refused(recipe, store, wheel):
    (recipe.folder / "requirements.lock").write_text("# another torch\n")
    with pytest.raises(PostTrainingError, match=r"packages of another requirements\.lock"):
        linked(recipe, store)


def test_compile_is_refused_where_it_can_do_nothing(recipe, tmp_path):
    check_compilable("some", recipe)
    with pytest.raises(UsageError, match=r"how to compile 'other'\nhint: there are: some$"):
        check_compilable("other", recipe)
    with pytest.raises(UsageError, match="emulated here: compiling would take days"):
        check_compilable("some", make_recipe(tmp_path / "elsewhere", ELSEWHERE))
    (recipe.folder / "compiled.lock").unlink()
    with pytest.raises(UsageError, match="the image tiny takes no compiled packages"):
        check_compilable("some", recipe)


def test_compile_of_a_package_that_is_named_already_is_refused(recipe, wheel):
    with pytest.raises(UsageError, match="names a wheel of some already"):
        check_compilable("some", recipe)


def test_jobs_are_as_many_as_memory_allows():
    assert default_jobs("MemTotal:  9 kB\nMemAvailable:    9000000 kB\n") == 1
    assert default_jobs("MemAvailable:     100 kB\n") == 1
    assert default_jobs("MemAvailable: 99999999999 kB\n") == len(os.sched_getaffinity(0))


def run_script(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run flash-attn's script with a pip that stands in; `folder` has its source and its target."""
    (folder / "source/flash_attn-1").mkdir(parents=True)
    (folder / "source/flash_attn-1/word").write_text("wheel")
    for name in ("bin", "wheels", "temporary"):
        (folder / name).mkdir()
    archive = folder / "flash_attn-1.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", folder / "source", "flash_attn-1"], check=True)
    (folder / "bin/pip").write_text(FAKE_PIP)
    (folder / "bin/pip").chmod(0o755)
    return subprocess.run(
        [SCRIPT, folder, folder / "wheels"],
        env={
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "TMPDIR": str(folder / "temporary"),
            "MAX_JOBS": "3",
            "CODE": "0",
            **variables,
        },
        capture_output=True,
        text=True,
    )


def with_compiler(folder: Path) -> str:
    """The CUDA_HOME that has one."""
    (folder / "cuda/bin").mkdir(parents=True)
    (folder / "cuda/bin/nvcc").symlink_to("/bin/true")
    return str(folder / "cuda")


def test_script_of_flash_attn_without_a_compiler_makes_nothing(tmp_path):
    for home in ({}, {"CUDA_HOME": str(tmp_path)}):
        folder = tmp_path / f"{len(home)}"
        done = run_script(folder, **home)
        assert done.returncode == 1
        assert done.stderr.startswith("error: this image has no compiler of CUDA: no program ")
        assert list((folder / "wheels").iterdir()) == []


def test_script_of_flash_attn_compiles_for_one_gpu_and_says_which_file(tmp_path):
    done = run_script(tmp_path, CUDA_HOME=with_compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TRUE 90 1 3\n  [1/73] /tmp/flash_fwd.cu\n"
    assert (tmp_path / "wheels/flash_attn-1-py3-none-any.whl").read_text() == "wheel"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_script_of_flash_attn_whose_compiler_fails_makes_no_wheel(tmp_path):
    done = run_script(tmp_path, CUDA_HOME=with_compiler(tmp_path), CODE="7")
    assert done.returncode != 0
    assert list((tmp_path / "wheels").iterdir()) == []


def test_selfcheck_imports_what_was_compiled(tmp_path, monkeypatch):
    info = tmp_path / "some_thing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_thing\nVersion: 1\n")
    (info / "top_level.txt").write_text("some_thing\nsome_thing_cuda\n")
    monkeypatch.syspath_prepend(tmp_path)
    packages = [CompiledPackage(name, "1", "1" * 64) for name in ("some-thing", "missing")]
    assert compiled_modules(tmp_path) == []
    (tmp_path / "compiled.lock").write_text(lock_text(packages))
    assert compiled_modules(tmp_path) == ["some_thing", "some_thing_cuda"]
