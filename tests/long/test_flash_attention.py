"""flash-attn's recipe on one of its 72 files of kernels: flash-attn's own setup compiles it, as the
recipe asks for, by the compiler and the headers of the image gh200.

The node that compiles all of it has arm64. Here the compiler is NVIDIA's for this machine, in the
same version, and the code for the GPU is the same. The image cpu has the Python packages; its torch
has no CUDA, which is what the setup looks for, so it is told that it has.
"""

import platform
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from post_training.images.base import ensure_wheels
from post_training.images.recipe import load_recipe
from post_training.images.registry import download_sources
from post_training.images.selfcheck import locked_versions
from post_training.images.store import ImageStore, default_store

REPOSITORY = Path(__file__).parents[2]
FLASH_ATTN = REPOSITORY / "containers/flash-attn"
KERNEL = "flash_fwd_hdim32_bf16_causal_sm80"
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")
TORCH_WITH_CUDA = """
import torch
torch._C._cuda_getDeviceCount = lambda: 0
torch.version.cuda = "13.0"
"""
# Where torch looks for it; all that is left to do after this file is more of the same.
NINJA_OF_ONE_FILE = f"""#!/bin/bash
ninja=/opt/post-training/venv/bin/ninja
[ "$1" != --version ] || exec $ninja --version
object=$(grep -o '[^ ]*/{KERNEL}[.]o' build.ninja | head -n 1)
$ninja "$@" "$object" || exit 1
echo "processor time, user and system, of this script and of ninja with all that it called:"
times
cp "$object" "$MADE"
echo "stopped after one file" >&2
exit 1
"""
# Of the container in which nvcc keeps code, and of what is in it: a program for one GPU is of kind
# 2, and its GPU is at byte 28.
_FATBIN_MAGIC, _FATBIN_HEADER, _KIND_PROGRAM, _GPU_AT = 0xBA55ED50, 16, 2, 28

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the image cpu is for x86_64"),
]


@pytest.fixture
def cuda(tmp_path) -> Path:
    """A CUDA_HOME: the compiler for this machine, and the headers of gh200, torch's in `torch`."""
    recipe = load_recipe("gh200", REPOSITORY)
    versions = locked_versions((recipe.folder / "requirements.lock").read_text())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:",
         "--target", tmp_path / "packages", *(f"{name}=={versions[name]}" for name in COMPILER)],
        check=True,
    )  # fmt: skip
    home = tmp_path / "packages/nvidia/cu13"
    # In the wheels, for arm64, and in the CUDA_HOME that is made here.
    headers = {"nvidia/cu13/include/": home / "include", "torch/include/": home / "torch"}
    for wheel in sorted(ensure_wheels(recipe, ImageStore(default_store())).glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for prefix, target in headers.items():
                for name in archive.namelist():
                    if name.startswith(prefix) and not name.endswith("/"):
                        path = target / name.removeprefix(prefix)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(archive.read(name))
    return home


def gpus_of(object_file: bytes) -> list[int]:
    """The GPUs, as 90 for sm_90, for which programs are in an object of nvcc's."""
    start = object_file.index(struct.pack("<I", _FATBIN_MAGIC))
    size = struct.unpack_from("<Q", object_file, start + 8)[0]
    at, end, found = start + _FATBIN_HEADER, start + _FATBIN_HEADER + size, []
    while at < end:
        kind, _, header_bytes, size_bytes = struct.unpack_from("<HHIQ", object_file, at)
        if kind == _KIND_PROGRAM:
            found.append(struct.unpack_from("<I", object_file, at + _GPU_AT)[0])
        at += header_bytes + size_bytes
    return found


def test_recipe_compiles_a_kernel_of_flash_attn_for_gh200(cuda, inside, tmp_path):
    for name in ("bin", "python", "sources", "wheels"):
        (tmp_path / name).mkdir()
    (tmp_path / "python/sitecustomize.py").write_text(TORCH_WITH_CUDA)
    (tmp_path / "bin/ninja").write_text(NINJA_OF_ONE_FILE)
    (tmp_path / "bin/ninja").chmod(0o755)
    shutil.copy(FLASH_ATTN / "compile", tmp_path)
    download_sources(FLASH_ATTN / "source.lock", tmp_path / "sources")
    variables = {
        "CPATH": cuda / "torch", "CUDA_HOME": cuda, "MADE": tmp_path / "kernel.o",
        "MAX_JOBS": 1, "PYTHONPATH": tmp_path / "python",
    }  # fmt: skip
    run = f'PATH="{tmp_path}/bin:$PATH" exec ./compile sources wheels'
    settings = [f"{name}={value}" for name, value in variables.items()]
    done = inside("env", *settings, "bash", "-c", run)
    print(done.stdout)
    assert "stopped after one file" in done.stdout, done.stdout + done.stderr
    assert f"src/{KERNEL}.cu" in done.stdout
    assert gpus_of((tmp_path / "kernel.o").read_bytes()) == [90]
    # One file is not a package.
    assert done.returncode != 0
    assert list((tmp_path / "wheels").iterdir()) == []
