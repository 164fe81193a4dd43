"""The stage run in this process on a context built by hand, and what it leaves."""

import copy
import json
from pathlib import Path
from typing import Any

from post_training.core.hashing import hash_files
from post_training.records.run import RunDescription
from post_training.stages.context import StageContext

TINY = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "vocab_size": 320,
}


def changed(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A copy with dotted keys changed: changed(config, **{"training.max_steps": 3})."""
    config = copy.deepcopy(config)
    for key, value in settings.items():
        *parents, last = key.split(".")
        block = config
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = value
    return config


def sft(
    config: dict[str, Any],
    run_dir: Path,
    *,
    resuming: bool = False,
    fingerprint: str = "a",
    description: RunDescription | None = None,
) -> Any:
    """Run the stage in this process; its Result. fingerprint: of the first dataset."""
    from post_training.train.config import SftConfig
    from post_training.train.sft import run

    run_dir.mkdir(parents=True, exist_ok=True)
    inputs = {"data.datasets[0].path": fingerprint}
    context = StageContext(
        run_dir, resuming=resuming, input_fingerprints=inputs, description=description
    )
    return run(SftConfig.model_validate(config), context)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their timing."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name != "timing"} for line in lines]


def stable_files(run_dir: Path) -> dict[str, str]:
    """{path: sha256} of everything a run leaves but its metrics, which hold times."""
    hashes = hash_files(run_dir)
    del hashes["metrics.jsonl"]
    return hashes
