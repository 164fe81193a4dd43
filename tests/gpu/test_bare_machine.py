"""The programs for a machine with a GPU, as on such a machine: a bare environment of its versions,
without a network, and the carried wheels. On a CPU, with tiny models."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
GPU = REPOSITORY / "reproducibility/benchmarks/gpu"
# What a GPU was lent with, and what its image has of what our training needs.
TORCH, TRANSFORMERS = "2.11.0", "5.17.0"
# Triton's interpreter of that time does not take numpy 2.4.
NUMPY = "2.3.5"
TRITON = "3.6.0"  # comes with torch's build for CUDA; its interpreter runs without a GPU
PRESENT = ["accelerate==1.15.0", "peft", "pyarrow", "pandas", "pyyaml", "rich", "requests"]
PRESENT += ["tensorboard", "einops", "msgpack", "ninja", "psutil", "py-cpuinfo", "sentencepiece"]
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(environment: Path, *arguments: str) -> bool:
    command = [environment / "bin/python", "-m", "pip", "install", "--quiet", *arguments]
    return subprocess.run(command).returncode == 0


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with torch and transformers, and nothing of ours."""
    environment = tmp_path_factory.mktemp("bare") / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # The CPU build where its index can be reached; else the one for CUDA, which a GPU machine has:
    # 3 GB, and it runs on a CPU too.
    if pip(environment, "--index-url", PYTORCH_INDEX, "--retries=0", f"torch=={TORCH}"):
        assert pip(environment, f"triton=={TRITON}")
    else:
        assert pip(environment, f"torch=={TORCH}")
    assert pip(environment, f"transformers=={TRANSFORMERS}", f"numpy=={NUMPY}", *PRESENT)
    return environment


@pytest.mark.long
def test_bare_machine_with_the_wheels_runs_every_step(bare: Path, tmp_path: Path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    made = [sys.executable, GPU / "wheels", tmp_path / "wheels", "--python", version]
    subprocess.run([*made, "--machine", platform.machine()], check=True)
    command = [bare / "bin/python", GPU / "run", "--wheels", tmp_path / "wheels"]
    command += ["--out", tmp_path / "out", "--device", "cpu", "--tiny", "--no-limits"]
    done = subprocess.run([*command, "--budget", "3600"], capture_output=True, text=True)
    logs = "".join(path.read_text() for path in sorted((tmp_path / "out").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    found = json.loads((tmp_path / "out/results.json").read_text())
    packages = found["machine"]["packages"]
    assert packages["torch"].partition("+")[0] == TORCH
    assert packages["transformers"] == TRANSFORMERS
    assert {step["status"] for step in found["steps"].values()} == {"ended"}
    assert "".join(found["steps"]) == "0abcdefg"
    results = [each for step in found["steps"].values() for each in step["results"]]
    checked = [each for each in results if "good" in each]
    # Step a: 5 losses, 3 of equal bytes; c: 3 ways; e: a group, determinism, compilation; g: six
    # kernels and a model.
    assert len(checked) >= 21
    skipped = [each["what"] for each in results if "skipped" in each]
    assert skipped == [
        "plain transformers loop, full, Liger's kernels",
        "ours, full, packed, varlen, Liger's kernels",
        "output layer and loss, Liger's kernels",
        "logits as float32",
        "fsdp2 on one rank",
    ]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--device", "cpu"], "--device cpu: only with --tiny"),
        (["--steps", "ax"], "--steps: there is no step x"),
        (["--wheels", "nowhere"], "--wheels: nowhere has no wheels"),
    ],
)
def test_run_with_wrong_arguments_says_which(arguments: list[str], problem: str, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, GPU / "run", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert problem in done.stderr
    assert not list(tmp_path.iterdir())


def test_run_where_packages_are_missing_names_them(tmp_path: Path):
    """This Python has no torch."""
    command = [sys.executable, GPU / "run", "--device", "cpu", "--tiny", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: torch can't be imported")
