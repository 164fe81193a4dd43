"""What `post-training data inspect` and `data count` look at: the data of a configuration of sft or
prepare, as training would read it, or an indexed dataset as it is.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from post_training.config.load import load_config
from post_training.config.model import Role, settings_by_role
from post_training.core.errors import ConfigError, UsageError
from post_training.data.config import DataConfig
from post_training.data.indexed.dataset import KINDS, TEXT, data_path, index_path
from post_training.data.prepared.dataset import PreparedDataset, SequenceStore
from post_training.images.identity import IMAGE_FILE
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import StageContext
from post_training.stages.prepare.config import PrepareConfig
from post_training.stages.sft.config import SftConfig

# Enough sequences for a packed row, whatever their length.
_SEQUENCES_IN_A_ROW = 64


class _AnySettings(BaseModel):
    model_config = ConfigDict(extra="allow")


def load_settings(path: Path, overrides: Sequence[str]) -> SftConfig | PrepareConfig:
    """Errors: ConfigError, also for what is missing here; UsageError for another stage's file."""
    check_there({"configuration": str(path)})
    keys = load_config(_AnySettings, path, overrides).data.keys()
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
    config = load_config(model, path, overrides).config
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
        from post_training.data.chat.special_tokens import with_special_tokens
        from post_training.models.load import load_tokenizer
        from post_training.stages.prepared_data import DataPreparation

        folder = config.tokenizer if isinstance(config, PrepareConfig) else config.model.path
        tokenizer = with_special_tokens(load_tokenizer(folder), data.special_tokens)
        context = StageContext(Path(temporary))
        preparation = DataPreparation(context, data, config.sft, tokenizer, config.seed)
        yield preparation.dataset(), tokenizer


def open_indexed(prefix: Path) -> PreparedDataset:
    """Each sequence as a row. prefix: PREFIX_text_document, or PREFIX of it; .bin or .idx may
    stand behind it. Without kinds beside it every token counts as trained, which is said."""
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    text = prefix.with_name(prefix.name + TEXT)
    tokens = text if index_path(text).exists() else prefix
    check_there({"--indexed": str(index_path(tokens))})
    kinds = tokens.with_name(tokens.name.removesuffix(TEXT) + KINDS)
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
