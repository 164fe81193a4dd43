"""`post-training data inspect`, `count` and `fetch`, inside the image.

They look at the data of a configuration of sft or prepare, as training would read it, or at an
indexed dataset as it is. stdout is data: samples, counts, the settings of what was fetched, the
path of what was written.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from tokenizers import Tokenizer

from post_training.config.load import load_config
from post_training.config.model import Role, settings_by_role
from post_training.core.errors import ConfigError, UsageError
from post_training.core.files import atomic_file, write_atomic
from post_training.data.config import DataConfig
from post_training.data.indexed import INDEXED_KINDS, TEXT, data_path, index_path
from post_training.data.inspection.samples import page, read_samples, show
from post_training.data.inspection.tokens import Vocabulary
from post_training.data.lengths import (
    build_piece_table,
    histogram,
    histogram_lines,
    summarise_lengths,
    table_lines,
    write_per_sample,
)
from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.data.sources.hub import fetch
from post_training.images.identity import IMAGE_FILE
from post_training.models.quiet import quiet_libraries
from post_training.stages.config import PrepareConfig
from post_training.stages.context import StageContext
from post_training.train.config import SftConfig

# Enough sequences for a packed row, whatever their length.
_SEQUENCES_IN_A_ROW = 64


def inspect_config(
    path: Path, overrides: Sequence[str], num_samples: int, row: int | None, html: Path | None
) -> None:
    """Show rows of a configuration's data.

    row: this one alone, from 1, as training numbers them; so it needs all of the data.
    """
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
    table = build_piece_table(dataset)
    names = [source["name"] for source in dataset.record["sources"]]
    if per_sample is not None:
        with atomic_file(per_sample) as temporary, open(temporary, "w", encoding="utf-8") as file:
            write_per_sample(table, names, file)
        _say(f"tokens per sample: {per_sample}")
    by_source = summarise_lengths(table, names)
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


class _AnySettings(BaseModel):
    model_config = ConfigDict(extra="allow")


def load_settings(path: Path, overrides: Sequence[str]) -> SftConfig | PrepareConfig:
    """Read the configuration of sft or prepare.

    Errors: ConfigError, also for what is missing here; UsageError for another stage's file.
    """
    check_there({"configuration": str(path)})
    keys = set(load_config(_AnySettings, path, overrides).model_extra or {})
    model: type[SftConfig] | type[PrepareConfig]
    if "dpo" in keys:
        raise UsageError(
            "it is of pairs, and these are not shown (`entrypoint prepare` counts them)",
            where=str(path),
        )
    if {"model", "data"} <= keys:
        model = SftConfig
    elif {"tokenizer", "data"} <= keys:
        model = PrepareConfig
    else:
        raise UsageError(
            f"neither a configuration of sft (model, data, sft, …) nor of prepare (tokenizer, "
            f"data, sft): it has {', '.join(sorted(keys)) or 'nothing'}",
            where=str(path),
        )
    config = load_config(model, path, overrides)
    check_there(_inputs(config))
    return config


@contextmanager
def open_prepared(
    config: SftConfig | PrepareConfig, num_rows: int | None
) -> Iterator[tuple[PreparedDataset, Any]]:
    """The dataset and its tokenizer, while the block runs. num_rows: only about as many of the
    first rows, without subsampling; None: all, as training has them."""
    data = config.data.model_copy(update={"cache_dir": None})
    if num_rows is not None:
        num_sequences = num_rows * (1 if config.sft.packing == "none" else _SEQUENCES_IN_A_ROW)
        data = _first_rows(data, num_sequences)
    # All of it may be more than fits into /tmp, which is memory in a container.
    is_all_prepared = num_rows is None and data.prepared is None
    place = Path.cwd() if is_all_prepared else None
    with tempfile.TemporaryDirectory(prefix=".post-training-data-", dir=place) as temporary:
        quiet_libraries(Path(temporary) / "cache")
        from post_training.data.chat.templates import with_special_tokens
        from post_training.models.load import load_tokenizer
        from post_training.stages.prepared_data import DataPreparation

        folder = config.tokenizer if isinstance(config, PrepareConfig) else config.model.path
        tokenizer = with_special_tokens(load_tokenizer(folder), data.special_tokens)
        context = StageContext(Path(temporary))
        preparation = DataPreparation(context, data, config.sft, tokenizer, config.seed)
        yield preparation.open_or_prepare(), tokenizer


def open_indexed(prefix: Path) -> PreparedDataset:
    """Each sequence as a row. prefix: PREFIX_text_document, or PREFIX of it; .bin or .idx may
    stand behind it. Without kinds beside it every token counts as trained, which is said."""
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    text = prefix.with_name(prefix.name + TEXT)
    tokens = text if index_path(text).exists() else prefix
    check_there({"--indexed": str(index_path(tokens))})
    kinds = tokens.with_name(tokens.name.removesuffix(TEXT) + INDEXED_KINDS)
    has_kinds = data_path(kinds).exists()
    if not has_kinds:
        print(
            f"no kinds beside it ({data_path(kinds)}): every token counts as trained",
            file=sys.stderr,
        )
    store = SequenceStore(tokens, kinds if has_kinds else None)
    if not len(store):
        raise UsageError("holds no sequence", where=str(index_path(tokens)))
    lengths = store.tokens.lengths.astype(np.int64)
    numbers = np.arange(len(store) + 1)
    pieces = np.stack([numbers[:-1], np.zeros_like(lengths), lengths], axis=1)
    record = {"sources": [{"name": tokens.name, "num_rows": len(store)}]}
    return PreparedDataset([store], numbers, pieces, record)


def _first_rows(data: DataConfig, num_sequences: int) -> DataConfig:
    whole = {"subsample_factor": None, "max_rows": None, "max_tokens": None}
    return data.model_copy(
        update={
            "debug_subsample": min(num_sequences, data.debug_subsample or num_sequences),
            "datasets": [dataset.model_copy(update=whole) for dataset in data.datasets],
            # Starting a process would take longer than the rows.
            "num_workers": 1,
        }
    )


def _inputs(config: SftConfig | PrepareConfig) -> dict[str, str]:
    """{key: path} of all that has to be there; of indexed datasets, their index."""
    paths: dict[str, str] = {}
    for key, value in settings_by_role(config)[Role.INPUT].items():
        if isinstance(value, list):
            ending = f"{TEXT}.idx" if key == "data.indexed" else ""
            paths |= {f"{key}[{index}]": f"{each}{ending}" for index, each in enumerate(value)}
        elif value is not None:
            paths[key] = value
    # Below the working directory, what is missing can be fetched: opening the dataset says how.
    if config.data.hub_dir is not None and not _is_below_here(config.data.hub_dir):
        paths["data.hub_dir"] = str(config.data.hub_dir)
    return paths


def check_there(paths: dict[str, str]) -> None:
    """paths: by the setting or option that names them. Errors: ConfigError for those missing."""
    missing = {key: path for key, path in paths.items() if not os.path.exists(path)}
    if not missing:
        return
    hint = None
    if IMAGE_FILE.exists() and not all(_is_below_here(Path(path)) for path in missing.values()):
        hint = (
            "the image sees the working directory and what the EDF mounts: name an EDF that mounts "
            "more (--environment), or run: post-training edf run --mount DIR:DIR post-training -- "
            "post-training data …"
        )
    faults = [f"{key}: no such file or folder: {path}" for key, path in missing.items()]
    raise ConfigError(faults, hint=hint)


def _is_below_here(path: Path) -> bool:
    return path.resolve().is_relative_to(Path.cwd())
