"""A model folder that plain transformers loads, and whose bytes tell nothing but the model.

And a new model to put in one: a byte-level BPE tokenizer that is trained on a corpus, with weights
drawn at random.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.core.files import atomic_directory, write_json
from post_training.models.left_out import keep_left_out

# Where a tokenizer or model was loaded from: different bytes for the same model elsewhere.
_PLACES = (
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "local_files_only",
    "is_local",
)
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_ARCHITECTURES = {"llama": LlamaConfig, "apertus": ApertusConfig}
# The marks of errors in writing: torch.save's own have no type.
_WRITER = re.compile("inline_container|PytorchStreamWriter|iostream|Parent directory")


def save_model_folder(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    *,
    base: Path | None = None,
) -> str | None:
    """Write weights (safetensors), configs, tokenizer and chat template; replaces `path` whole.

    weights: gathered from where they were sharded; by default the model's own.
    base: the folder the model was read from; what it holds beside the model is kept (left_out.py).
    Returns a warning where that can't be.
    """
    shutil.rmtree(path, ignore_errors=True)
    with explain_write_errors(path.parent), atomic_directory(path) as temporary:
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        problem = None if base is None else keep_left_out(temporary, base, model)
        remove_places(temporary)
    return None if problem is None else f"{path}: {problem}"


@contextmanager
def explain_write_errors(
    folder: Path, then: str = "goes on from the last checkpoint"
) -> Iterator[None]:
    """What torch and safetensors say when a disk is full names neither the file nor the reason.
    Writing also gathers what is sharded: a lost rank or no GPU memory is left to speak for itself.

    then: what the same command does, once there is room.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if _is_of_reading(error, folder):
            raise
        if isinstance(error, RuntimeError) and not _WRITER.search(str(error)):
            raise
        reason = str(error).splitlines()[0].lower()
        free_mb = shutil.disk_usage(folder).free / 1e6
        raise PostTrainingError(
            f"cannot write: {reason} ({free_mb:.1f} MB are free there)",
            where=str(folder),
            hint=f"make room, or choose another run_dir; the same command {then}",
        ) from error


def _is_of_reading(error: Exception, folder: Path) -> bool:
    """Whether a file elsewhere is what it is about: of the model that is converted, or left out."""
    named = getattr(error, "filename", None)
    return isinstance(named, str) and not Path(named).absolute().is_relative_to(folder.absolute())


def stop_at(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> None:
    """Let generation stop at `end_of_turn` too: it often isn't the tokenizer's eos token."""
    ids = tokenizer.encode(end_of_turn, add_special_tokens=False)
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if len(ids) == 1 and ids[0] not in known:
        model.generation_config.eos_token_id = [*known, ids[0]]


def remove_places(folder: Path) -> None:
    """Take what names a place out of the JSON files of a model's or adapter's folder."""
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and any(key in content for key in _PLACES):
            write_json(file, {key: value for key, value in content.items() if key not in _PLACES})


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, markers: tuple[str, ...], chat_template: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text is representable, there is no unknown token. The same
    texts give the same tokenizer.

    vocab_size: an upper limit; a small corpus has fewer pairs to merge.
    markers: the chat template's own tokens.
    """
    special = [BOS, EOS, PAD, *markers]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise PostTrainingError(
            f"vocab_size: must be ≥ {len(alphabet) + len(special)}: "
            f"{len(alphabet)} bytes and {len(special)} special tokens (got {vocab_size})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def create_model(
    architecture: Literal["llama", "apertus"],
    shape: dict[str, int | bool],
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> PreTrainedModel:
    """Weights in float32, drawn on the CPU from `seed`. shape: sizes, named as in the config."""
    config = _ARCHITECTURES[architecture](
        **shape,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
