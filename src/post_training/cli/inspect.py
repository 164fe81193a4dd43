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
from post_training.data.config import DataConfig, PairConfig, SequenceConfig
from post_training.data.indexed import INDEXED_KINDS, TEXT, data_path, index_path
from post_training.data.inspection.pairs import read_pair_samples
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
from post_training.data.order import times_used
from post_training.data.pairs.dataset import PairDataset
from post_training.data.pairs.lengths import (
    build_pair_table,
    pair_table_lines,
    summarise_pairs,
    write_per_pair,
)
from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.data.shares import Reading, share_lines, shares_by_source
from post_training.data.sources.hub import fetch
from post_training.images.identity import IMAGE_FILE
from post_training.models.quiet import quiet_libraries
from post_training.stages.config import PrepareConfig
from post_training.stages.context import StageContext
from post_training.train.config import DpoConfig, RewardModelConfig, SftConfig

AnyConfig = SftConfig | DpoConfig | RewardModelConfig | PrepareConfig
AnyDataset = PreparedDataset | PairDataset
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
    config = load_settings(path, overrides)
    with open_prepared(config, None) as (dataset, _):
        _count(dataset, _reading(config, dataset), as_json, per_sample)


def count_indexed(prefix: Path, *, as_json: bool, per_sample: Path | None) -> None:
    dataset = open_indexed(prefix)
    _count(dataset, _every_row_once(dataset), as_json, per_sample)


def fetch_dataset(
    hub: str, revision: str | None, subset: str | None, split: str, hub_dir: Path
) -> None:
    fetched = fetch(hub, revision, subset, split, hub_dir)
    _say(f"licence, as its card states it: {fetched.licence or 'not stated'}")
    _say(f"{fetched.num_rows:,} rows in {fetched.folder}; for data.datasets:")
    print(fetched.settings())


def _inspect(
    dataset: AnyDataset,
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
    is_of_pairs = isinstance(dataset, PairDataset)
    read = read_pair_samples if is_of_pairs else read_samples
    samples = read(dataset, vocabulary, rows)
    if html is None:
        show(samples, Console())
    else:
        write_atomic(html, page(samples, name))
        print(html)


def _count(dataset: AnyDataset, reading: Reading, as_json: bool, per_sample: Path | None) -> None:
    names = [source["name"] for source in dataset.record["sources"]]
    table: Any
    if isinstance(dataset, PairDataset):
        table = build_pair_table(dataset)
        by_source, write, lengths = summarise_pairs(table, names), write_per_pair, table.longest
        what, is_first = "pairs", np.ones(len(table.row), bool)
        lines = pair_table_lines(by_source)
    else:
        table = build_piece_table(dataset)
        by_source, write = summarise_lengths(table, names), write_per_sample
        what, is_first, lengths = "sequences", table.is_first, table.length[table.is_first]
        lines = table_lines(by_source)
    if per_sample is not None:
        with atomic_file(per_sample) as temporary, open(temporary, "w", encoding="utf-8") as file:
            write(table, names, file)
        _say(f"tokens per sample: {per_sample}")
    columns = {key: getattr(table, key) for key in ("row", "source", "num_tokens", "num_trained")}
    shares = shares_by_source(names, reading, **columns, is_first=is_first)
    bins = histogram(lengths)
    if as_json:
        counts: dict[str, Any] = {
            "num_rows": len(dataset),
            "rejected": dataset.record.get("rejected", {}),
            "sources": [asdict(each) for each in by_source],
            "lengths": [asdict(each) for each in bins],
            "reading": {
                "num_steps": reading.num_steps,
                "num_rows": int(reading.times.sum()),
                "sources": [asdict(each) for each in shares],
            },
        }
        print(json.dumps(counts, indent=2, ensure_ascii=False))
        return
    for line in lines:
        print(line)
    if reading.num_steps is not None or len(names) > 1:
        print()
        for line in share_lines(reading, shares, what):
            print(line)
    print()
    for line in histogram_lines(bins, what):
        print(line)


def _reading(config: AnyConfig, dataset: AnyDataset) -> Reading:
    """Which rows a run of this configuration reads, and how often."""
    if isinstance(config, PrepareConfig):
        return _every_row_once(dataset)
    num_steps = config.training.num_steps(dataset.record["counts"])
    num_samples = num_steps * config.training.effective_batch_size
    is_shuffled = config.training.shuffle and not config.data.debug_oom
    seed = config.seed if is_shuffled else None
    return Reading(num_steps, times_used(len(dataset), num_samples, seed))


def _every_row_once(dataset: AnyDataset) -> Reading:
    return Reading(None, np.ones(len(dataset), np.int64))


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class _AnySettings(BaseModel):
    model_config = ConfigDict(extra="allow")


def load_settings(path: Path, overrides: Sequence[str]) -> AnyConfig:
    """Read the configuration of a stage that trains, or of prepare.

    Errors: ConfigError, also for what is missing here; UsageError for another stage's file.
    """
    check_there({"configuration": str(path)})
    keys = set(load_config(_AnySettings, path, overrides).model_extra or {})
    model: type[AnyConfig]
    if {"tokenizer", "data"} <= keys and "model" not in keys:
        model = PrepareConfig
    elif not {"model", "data"} <= keys:
        raise UsageError(
            f"neither a configuration of sft, dpo or reward-model (model, data, …) nor of prepare "
            f"(tokenizer, data, …): it has {', '.join(sorted(keys)) or 'nothing'}",
            where=str(path),
        )
    elif "dpo" in keys:
        model = DpoConfig
    elif "sft" in keys:
        model = SftConfig
    else:  # It has no block that must be there.
        model = RewardModelConfig
        if "pairs" not in keys:
            _say(f"{path}: read as one of reward-model, since it has no block sft or dpo")
    config = load_config(model, path, overrides)
    check_there(_inputs(config))
    return config


@contextmanager
def open_prepared(config: AnyConfig, num_rows: int | None) -> Iterator[tuple[AnyDataset, Any]]:
    """The dataset and its tokenizer, while the block runs. num_rows: only about as many of the
    first rows, without subsampling; None: all, as training has them."""
    data = config.data.model_copy(update={"cache_dir": None})
    if num_rows is not None:
        is_packed = _limits(config).packing != "none"
        num_sequences = num_rows * (_SEQUENCES_IN_A_ROW if is_packed else 1)
        data = _first_rows(data, num_sequences)
    # All of it may be more than fits into /tmp, which is memory in a container.
    is_all_prepared = num_rows is None and data.prepared is None
    place = Path.cwd() if is_all_prepared else None
    with tempfile.TemporaryDirectory(prefix=".post-training-data-", dir=place) as temporary:
        quiet_libraries(Path(temporary) / "cache")
        from post_training.data.chat.templates import with_special_tokens
        from post_training.models.load import load_tokenizer

        folder = config.tokenizer if isinstance(config, PrepareConfig) else config.model.path
        tokenizer = with_special_tokens(load_tokenizer(folder), data.special_tokens)
        context = StageContext(Path(temporary))
        yield _preparation(config, context, data, folder, tokenizer).open_or_prepare(), tokenizer


def _limits(config: AnyConfig) -> SequenceConfig | PairConfig:
    if isinstance(config, RewardModelConfig):
        return config.pairs
    limits = getattr(config, "dpo", None) or getattr(config, "sft", None)
    assert limits is not None
    return limits


def _preparation(
    config: AnyConfig, context: StageContext, data: DataConfig, folder: Path, tokenizer: Any
) -> Any:
    """What the stage itself prepares its data by. folder: of the tokenizer."""
    from post_training.stages.prepared_data import (
        DataPreparation,
        PairPreparation,
        TextPairPreparation,
        num_embedded_ids,
    )

    limits = _limits(config)
    if isinstance(config, RewardModelConfig):
        return TextPairPreparation(context, data, limits, tokenizer, config.seed)
    if isinstance(limits, PairConfig):
        num_ids = num_embedded_ids(folder)
        return PairPreparation(context, data, limits, tokenizer, config.seed, num_ids=num_ids)
    return DataPreparation(context, data, limits, tokenizer, config.seed)


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


def _inputs(config: AnyConfig) -> dict[str, str]:
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
