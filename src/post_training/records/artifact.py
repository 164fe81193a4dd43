"""An artifact: a folder (model, dataset) with artifact.json, which is written last.

The fingerprint is over its files without artifact.json; the record inside is a copy of the run
that made it, so lineage outlives the run folder.
"""

from pathlib import Path
from typing import Any

from post_training.core.errors import PostTrainingError
from post_training.core.files import write_json
from post_training.core.hashing import ARTIFACT_RECORD, fingerprint_files, hash_files

SCHEMA = "post-training/artifact/1"


def seal_artifact(folder: Path, kind: str, run_record: dict[str, Any]) -> dict[str, Any]:
    """Fingerprint the folder's files and write artifact.json; what it says.

    Errors: PostTrainingError when the folder is missing or empty.
    """
    files = hash_files(folder) if folder.is_dir() else {}
    if not files:
        raise PostTrainingError(f"the stage left no {kind}", where=str(folder))
    artifact = {
        "schema": SCHEMA,
        "kind": kind,
        "fingerprint": fingerprint_files(files),
        "files": files,
        "made_by": run_record,
    }
    write_json(folder / ARTIFACT_RECORD, artifact)
    return artifact
