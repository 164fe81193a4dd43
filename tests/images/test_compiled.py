"""A package of one C file, compiled in the built image by the real builder."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError
from post_training.core.hashing import sha256_file
from post_training.images import builder
from post_training.images.base import ensure_base
from post_training.images.build import find_built, image_identity
from post_training.images.compiled import compile_package, link_compiled, lock_text, read_compiled
from post_training.images.recipe import Recipe, load_recipe
from post_training.images.store import ImageStore, default_store

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parents[2]
SOURCE = {
    "tiny-1/PKG-INFO": "Metadata-Version: 2.2\nName: tiny\nVersion: 1\n",
    "tiny-1/setup.py": (
        "from setuptools import Extension, setup\n"
        'setup(name="tiny", version="1", ext_modules=[Extension("tiny", ["tiny.c"])])\n'
    ),
    "tiny-1/tiny.c": (
        "#include <Python.h>\n"
        'static struct PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "tiny"};\n'
        "PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&tiny); }\n"
    ),
}
SCRIPT = """#!/bin/sh
set -eu
[ "$MAX_JOBS" = 2 ]
! getent hosts localhost.example || exit 1
pip wheel --no-index --no-build-isolation --no-deps --quiet --wheel-dir "$2" "$1"/tiny-1.tar.gz
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """cpu's, with a compiled.lock, and the package `tiny` beside it."""
    archive = tmp_path / "index/tiny-1.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        for name, text in SOURCE.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            file.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    for name in ("cpu", "tiny"):
        (tmp_path / "containers" / name).mkdir(parents=True)
    (tmp_path / "containers/cpu/compiled.lock").write_text(lock_text([]))
    (tmp_path / "containers/tiny/source.lock").write_text(
        f"tiny==1 --hash=sha256:{sha256_file(archive)}\n"
    )
    write_script(tmp_path, SCRIPT)
    real = REPOSITORY / "containers/cpu/requirements.lock"
    return Recipe("cpu", tmp_path, {"requirements.lock": real})


def write_script(repository: Path, text: str) -> None:
    path = repository / "containers/tiny/compile"
    path.write_text(text)
    path.chmod(0o755)


def test_package_is_compiled_in_the_built_image_for_the_next_build(image_edf, recipe, tmp_path):
    store, real = ImageStore(tmp_path / "store"), load_recipe("cpu", REPOSITORY)
    image = find_built(image_identity(real, ensure_base(real, ImageStore(default_store()))))
    assert image, "the builder does not have the image: run `make image`"

    write_script(tmp_path, "#!/bin/sh\ntouch /wheels/half.whl\nexit 3\n")
    with pytest.raises(PostTrainingError, match="failed with exit code 3"):
        compile_package("tiny", recipe, image, store)
    write_script(tmp_path, "#!/bin/sh\ntouch /wheels/tiny-2-py3-none-any.whl\n")
    with pytest.raises(PostTrainingError, match=r"and not one wheel of version 1$"):
        compile_package("tiny", recipe, image, store)
    assert read_compiled(recipe) == []
    assert list(store.folder.iterdir()) == []

    write_script(tmp_path, SCRIPT)
    wheel = compile_package("tiny", recipe, image, store, num_jobs=2)
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.endswith(".so") for name in archive.namelist())
    [named] = read_compiled(recipe)
    assert (named.name, named.version, named.sha256) == ("tiny", "1", sha256_file(wheel))
    record = json.loads((wheel.parent / "compiled.json").read_text())
    assert record["image_oci_digest"] == image.oci_digest
    (tmp_path / "linked").mkdir()
    link_compiled(recipe, tmp_path / "linked", store)
    # As the Dockerfile installs it.
    builder.run_offline(
        image.tag,
        ["sh", "-c", "/steps/install /cpu/compiled.lock /linked && python -c 'import tiny'"],
        volumes={
            "/steps": REPOSITORY / "containers/steps",
            "/cpu": recipe.folder,
            "/linked": tmp_path / "linked",
        },
        environment={},
    )
