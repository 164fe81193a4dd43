"""`post-training runs export`: a run's record and small files as one archive, the same bytes each
time, that others' tools can read.

RUN_ID.zip    ro-crate-metadata.json    for people and catalogues (records/crate.py)
              provenance.intoto.json    for supply chains (records/in_toto.py); not of unfinished
                                        runs and edited records
              run.json config.yaml …    the run folder's own files, as they are

Weights and datasets stay where they are; both descriptions name them by their sha256.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from post_training.core.errors import UsageError
from post_training.core.files import atomic_file
from post_training.records.crate import CRATE_NAME, crate
from post_training.records.in_toto import STATEMENT_NAME, statement
from post_training.records.run_record import is_edited, is_live, read_record
from post_training.records.show import EDITED

LARGEST_BYTES = 1 << 20
_DATE = (1980, 1, 1, 0, 0, 0)  # The first that a ZIP can say.


def export_run(run_dir: Path, target: Path | None) -> Path:
    """The archive, RUN_ID.zip in the working folder unless `target` names another.

    Errors: UsageError for a live run, and when the archive is there already.
    """
    record = read_record(run_dir)
    if is_live(run_dir):
        raise UsageError("the run is live", where=str(run_dir), hint="export it when it has ended")
    target = target or Path(f"{record['run_id']}.zip")
    if target.exists():
        raise UsageError("there already", where=str(target), hint="choose another --output")
    files = {name: (run_dir / name).read_bytes() for name in sorted(_small_files(run_dir))}
    made = {CRATE_NAME: crate(record, list(files))}
    if is_edited(record):
        print(
            f"warning: {run_dir}: {EDITED}, so the archive has no {STATEMENT_NAME}", file=sys.stderr
        )
    elif record["outputs"] is not None:
        made[STATEMENT_NAME] = statement(record)
    with (
        atomic_file(target) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, value in made.items():
            _add(archive, name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
        for name, content in files.items():
            _add(archive, name, content)
    return target


def _small_files(run_dir: Path) -> Iterator[str]:
    for path in run_dir.rglob("*"):
        name = path.relative_to(run_dir)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and path.stat().st_size <= LARGEST_BYTES:
            yield name.as_posix()


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.external_attr = 0o644 << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, content)
