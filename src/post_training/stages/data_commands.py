"""`post-training data inspect`, `count` and `fetch`, inside the image.

stdout is data: samples, counts, the settings of what was fetched, the path of what was written.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from post_training.core.errors import UsageError
from post_training.core.files import atomic_file, write_atomic
from post_training.data.inspection.counts import histogram_lines, table_lines
from post_training.data.inspection.page import page
from post_training.data.inspection.samples import read_samples
from post_training.data.inspection.terminal import show
from post_training.data.inspection.vocabulary import Vocabulary
from post_training.data.lengths import histogram, piece_table, source_figures, write_per_sample
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.sources.fetch import fetch
from post_training.stages.inspected_data import (
    check_there,
    load_settings,
    open_indexed,
    open_prepared,
)


def inspect_config(
    path: Path, overrides: Sequence[str], num_samples: int, row: int | None, html: Path | None
) -> None:
    """row: from 1, as training numbers them; so it needs all of the data."""
    config = load_settings(path, overrides)
    if config.data.datasets and row is None:
        _say("preparing the first rows only; --row N prepares all")
    with open_prepared(config, num_samples if row is None else None) as (dataset, tokenizer):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        _inspect(dataset, Vocabulary.of_tokenizer(backend), num_samples, row, html, path.name)


def inspect_indexed(
    prefix: Path, tokenizer: Path, num_samples: int, row: int | None, html: Path | None
) -> None:
    check_there({"--tokenizer": str(tokenizer)})
    dataset = open_indexed(prefix)
    _inspect(dataset, Vocabulary.load(tokenizer), num_samples, row, html, prefix.name)


def count_config(
    path: Path, overrides: Sequence[str], *, as_json: bool, per_sample: Path | None
) -> None:
    with open_prepared(load_settings(path, overrides), None) as (dataset, _):
        _count(dataset, as_json, per_sample)


def count_indexed(prefix: Path, *, as_json: bool, per_sample: Path | None) -> None:
    _count(open_indexed(prefix), as_json, per_sample)


def fetch_dataset(
    hub: str, revision: str | None, subset: str | None, split: str, hub_dir: Path
) -> None:
    fetched = fetch(hub, revision, subset, split, hub_dir)
    _say(f"{fetched.num_rows:,} rows in {fetched.folder}; for data.datasets:")
    print(fetched.settings())


def _inspect(
    dataset: PreparedDataset,
    vocabulary: Vocabulary,
    num_samples: int,
    row: int | None,
    html: Path | None,
    name: str,
) -> None:
    if row is not None and row > len(dataset):
        raise UsageError(f"--row: must be ≤ {len(dataset)}, the number of rows (got {row})")
    first, num_rows = (0, num_samples) if row is None else (row - 1, 1)
    rows = range(first, min(first + num_rows, len(dataset)))
    samples = read_samples(dataset, vocabulary, rows)
    if html is None:
        show(samples, Console())
    else:
        write_atomic(html, page(samples, name))
        print(html)


def _count(dataset: PreparedDataset, as_json: bool, per_sample: Path | None) -> None:
    table = piece_table(dataset)
    names = [source["name"] for source in dataset.record["sources"]]
    if per_sample is not None:
        with atomic_file(per_sample) as temporary, open(temporary, "w", encoding="utf-8") as file:
            write_per_sample(table, names, file)
        _say(f"tokens per sample: {per_sample}")
    by_source = source_figures(table, names)
    bins = histogram(table.length[table.is_first])
    if as_json:
        counts: dict[str, Any] = {
            "num_rows": len(dataset),
            "rejected": dataset.record.get("rejected", {}),
            "sources": [asdict(each) for each in by_source],
            "lengths": [asdict(each) for each in bins],
        }
        print(json.dumps(counts, indent=2, ensure_ascii=False))
        return
    for line in table_lines(by_source):
        print(line)
    print()
    for line in histogram_lines(bins):
        print(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
