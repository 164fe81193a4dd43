"""Where a run goes that nobody gave a folder: OUTPUT_BASE/STAGE-MODEL-DATA-DIGEST.

The digest is of the recipe and the inputs, so that the same run finds its own folder again. The
names are for readers; without the digest they say nothing about identity.
"""

import re
from pathlib import Path
from typing import Any

from post_training.core.hashing import sha256_value
from post_training.records.run import RunDescription
from post_training.stages.config import StageConfig

_LONGEST_NAME = 24
# Folders that every run has: the one above says whose.
_OF_ANY_RUN = ("model", "adapter", "dataset", "inference_checkpoints")
_COMMIT = re.compile("[0-9a-f]{40}")


def default_run_dir(config: StageConfig, description: RunDescription) -> Path:
    """The folder of this run; the one by the digest alone, where an earlier version began it."""
    base = config.output_base or Path("runs")
    if description.facts["debug"]:
        base = base / "debug"
    content = {"recipe": description.recipe, "inputs": description.input_fingerprints}
    digest = sha256_value(content)[:12]
    earlier = base / f"{description.stage}-{digest}"
    if earlier.is_dir():
        return earlier
    return base / "-".join([description.stage, *_names(config), digest])


def _names(config: Any) -> list[str]:
    """Of the model and the data, where the stage has them."""
    model, data = getattr(config, "model", None), getattr(config, "data", None)
    found = []
    if model is not None:
        found.append(model.hub.rpartition("/")[2] if model.hub else _name_of(model.path))
    if datasets := getattr(data, "datasets", None):
        first = datasets[0]
        name = first.name or (first.hub and first.hub.rpartition("/")[2]) or _name_of(first.path)
        found.append(f"{name}+{len(datasets) - 1}" if datasets[1:] else name)
    slugs = (re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-.") for name in found)
    return [slug[:_LONGEST_NAME].rstrip("-.") for slug in slugs if slug]


def _name_of(path: Path) -> str:
    """A file's name without its ending; of a folder in a run, that run's."""
    parts = list(path.parts)
    while len(parts) > 1 and (parts[-1] in _OF_ANY_RUN or _COMMIT.fullmatch(parts[-1])):
        parts.pop()
    name = parts[-1]
    for ending in (".jsonl", ".ndjson", ".json", ".parquet"):
        name = name.removesuffix(ending)
    return name
