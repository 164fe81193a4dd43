"""Runs of a stage with vLLM, one after another in a process of their own: an engine stays in its
process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The method is given prompts, and dies of those that are poisoned.
_RUN = """
import json, sys
from pathlib import Path
from helpers.annotation_stages import run_stage
from post_training.annotate.MODULE import OWNER

settings = json.loads(sys.argv[1])
original = OWNER.METHOD
def method(self, prompts):
    if poison and any(POISONED for prompt in prompts):
        raise RuntimeError("the engine died")
    return original(self, prompts)
poison = None
OWNER.METHOD = method
for run_dir, changes, poison in settings["runs"]:
    run_stage(settings["stage"], {**settings["config"], **changes}, Path(run_dir))
"""


def run_with_vllm(
    stage: str,
    method: str,
    poisoned: str,
    config: dict[str, Any],
    runs: Sequence[tuple[Path, dict[str, Any], Any]],
) -> None:
    """method: MODULE.OWNER.METHOD below post_training.annotate. poisoned: Python, of prompt and
    poison. runs: the run folder, changes to the configuration, and the poison or None."""
    module, owner, name = method.rsplit(".", 2)
    words = {"MODULE": module, "OWNER": owner, "METHOD": name, "POISONED": poisoned}
    script = _RUN
    for word, text in words.items():
        script = script.replace(word, text)
    placed = [(str(run_dir), *rest) for run_dir, *rest in runs]
    settings = {"stage": stage, "config": config, "runs": placed}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(settings)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
