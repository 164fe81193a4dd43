"""Run inside the image as the last build step: versions equal the locks, and everything imports."""

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

CONFIGURATION = Path("/etc/post-training")
IMPORTS = (
    *("torch", "transformers", "trl", "accelerate", "datasets", "peft", "sentencepiece"),
    *("deepspeed", "deepspeed.ops.adam.cpu_adam_op", "deepspeed.ops.comm.deepspeed_shm_comm_op"),
    *("pytorch_optimizer", "torch.utils.tensorboard", "wandb"),
    *("vllm", "vllm._C", "pydantic", "yaml", "post_training.cli"),
    *("post_training.stages.prepared_data", "post_training.stages.data_commands"),
)


def locked_versions(lock: str) -> dict[str, str]:
    """{name: version} of the `name==version` lines of a requirements file."""
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock, flags=re.MULTILINE))


def stage_modules() -> list[str]:
    """What each stage runs; by its file, since this layer knows nothing of the stages."""
    stages = Path(__file__).parents[1] / "stages"
    return [
        f"post_training.stages.{run.parent.name}.run" for run in sorted(stages.glob("*/run.py"))
    ]


def main() -> int:
    wrong = []
    for lock in sorted(CONFIGURATION.glob("*.lock")):
        for name, version in locked_versions(lock.read_text()).items():
            try:
                installed = metadata.version(name)
            except metadata.PackageNotFoundError:
                installed = "nothing"
            if installed != version:
                wrong.append(f"{name}: {lock.name} has {version}, installed is {installed}")
    for module in (*IMPORTS, *stage_modules()):
        try:
            importlib.import_module(module)
        except Exception as error:
            wrong.append(f"import {module}: {error}")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
