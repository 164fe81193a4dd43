"""A model and its tokenizer from a folder on disk. Nothing is downloaded, no code of it is run.

A folder that brings code is refused: transformers would ask on the terminal whether to run it, and
without an answer load something else than its maker meant.
"""

import copy
import json
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError, first_line
from post_training.core.files import read_json_object
from post_training.models.attention import check_left_out
from post_training.models.left_out import note_left_out
from post_training.models.text_part import (
    NAMES_IN_FOLDERS,
    find_text_part,
    forget_names_in_folder,
)
from post_training.models.varlen import register_varlen
from post_training.models.weight_files import INDEX, read_index
from post_training.records.run_record import RECORD_NAME

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Weights can be kept in float16 too; nothing here computes in it.
DTYPES_OF_WEIGHTS = {**DTYPES, "float16": torch.float16}
# Files in which transformers looks for a class of the folder's own.
_WITH_CODE = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_TOKENIZER_FILE = "tokenizer.json"
# Texts of which a tokenizer must give the ids of its file: what classes split or replace otherwise.
_TEXTS = (
    "Hello world",
    " a leading space, and two at the end  ",
    "It's we're THEY'LL I'd don’t can't've",
    "one\ntwo\n\nthree\r\n\tfour\n   five\n",
    "0 12 345 6789 31415926 3.14e-10 1,000,000 ½ ² ٣",
    "def f(x):\n    return {'a': [x**2, -1]}  # (ok) <b>&amp;</b> //path/to_file.txt",
    "Zürich naïve café cafe\u0301 Straße ŁÓDŹ ﬁn Ａ１",
    "你好，世界。日本語のテキスト。한국어 텍스트",
    "Привет мир Γειά σου שלום עולם مرحبا بالعالم नमस्ते दुनिया ไทย",
    "👩‍👩‍👧‍👦 🇨🇭 ✓ → ∑ \u00a0\u2003\u200b\ufeff|",
)
# Where a text begins anew, classes differ in what they put before it.
_BEHIND_A_TOKEN = ("Hello", " Hello", "\nHello", "\n\n  x", "1 and 2", "é")
_MOST_TOKENS = 4
_OF_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that take it as it is
_NAME_IT = (
    f'set "tokenizer_class": "{_OF_THE_FILE[0]}" in the tokenizer_config.json of a copy, and the '
    "file is taken as it is"
)
_INSISTS = (
    "for models of this type transformers takes its own class, whatever the folder says; this "
    "tokenizer can't be used with them"
)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or of one with a tokenizer alone; always a fast one, which
    knows offsets."""
    _check_folder(path)
    with explain_errors(path, "no tokenizer can be loaded from this folder"):
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        problem = "its tokenizer has no tokenizer.json and can't be converted to one"
        raise PostTrainingError(problem, where=str(path))
    check_ids_of_file(path, tokenizer)
    return tokenizer


def read_config(path: Path) -> PreTrainedConfig:
    """config.json, with the defaults of its architecture; of a folder that holds more than text,
    that of its language model. Errors: PostTrainingError."""
    settings = read_model_settings(path)
    with explain_errors(path, "config.json can't be read"):
        if (part := find_text_part(path, settings)) is not None:
            return part.config
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_model(
    path: Path, *, dtype: str, attn_implementation: str, tensor_parallel_size: int = 1
) -> PreTrainedModel:
    """A causal language model with its weights in `dtype` (a key of DTYPES), on the CPU. Of a
    folder that holds more than text, its language model (text_part.py).

    tensor_parallel_size: over how many ranks, all of torch.distributed's, each layer is spread;
    above 1 each rank's part is read onto its own device. Embedding and output layer stay whole.
    Errors: PostTrainingError when the folder is no model, or lacks any of the model's weights.
    """
    # The chunked head (head.py) needs all of the output layer, and of the embedding where the two
    # are one.
    whole = dict.fromkeys(("lm_head", "model.embed_tokens"), "replicated_with_grad_allreduce")
    spread = _spread(path, tensor_parallel_size, whole)
    settings = read_model_settings(path)
    with explain_errors(path, "the model can't be loaded"):
        part = find_text_part(path, settings)
    if part is None:
        model = _load(AutoModelForCausalLM, path, dtype, attn_implementation, **spread)
    else:
        within = {"config": part.config, "key_mapping": NAMES_IN_FOLDERS}
        model = _load(part.model_class, path, dtype, attn_implementation, **within, **spread)
        forget_names_in_folder(model)
    _check_generation(path, model)
    check_left_out(model, attn_implementation)
    return model


def load_reward_model(
    path: Path, *, dtype: str, attn_implementation: str, tensor_parallel_size: int = 1
) -> PreTrainedModel:
    """A sequence-classification model with one output, a number: `model.score` of a state.

    tensor_parallel_size: as of load_model.
    Errors: as of load_model; PostTrainingError for a model with several outputs.
    """
    settings = read_model_settings(path)
    # With a new head, transformers would give a language model rewards drawn at random.
    architectures = settings.get("architectures") or ["none"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise PostTrainingError(
            f"not a reward model: its architecture is {architectures[0]}, must be one "
            "ForSequenceClassification",
            where=str(path),
            hint="train one with `entrypoint reward-model`",
        )
    spread = _spread(path, tensor_parallel_size)
    model = _load(AutoModelForSequenceClassification, path, dtype, attn_implementation, **spread)
    if model.config.num_labels != 1 or not hasattr(model, "score"):
        raise PostTrainingError(
            f"not a reward model: it must give one number (its outputs: {model.config.num_labels})",
            where=str(path),
        )
    return model


def load_untrained_reward_model(
    path: Path, *, dtype: str, attn_implementation: str, pad_token_id: int, seed: int
) -> PreTrainedModel:
    """A reward model to be trained: a language model with one output, drawn from the seed, in place
    of its vocabulary's; or a reward model as it is.

    pad_token_id: what follows a conversation's last token in a batch.
    Errors: as of load_model; PostTrainingError where the architecture has no such model.
    """
    torch.manual_seed(seed)  # the new output is drawn where the weights are read
    model = _load(
        AutoModelForSequenceClassification,
        path,
        dtype,
        attn_implementation,
        may_lack={"score.weight"},
        num_labels=1,
        pad_token_id=pad_token_id,
    )
    check_left_out(model, attn_implementation)
    return model


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """Give a model the weights of a folder that its own `save_pretrained` wrote.

    They go through from_pretrained, which undoes what the saving did: in memory the experts of a
    mixture are one tensor, in files each has its own name. For the moment there are two models.
    Errors: PostTrainingError where a name, a size or a dtype is not the model's.
    """
    with explain_errors(path, "the weights can't be loaded"):
        loaded, info = type(model).from_pretrained(
            path,
            config=copy.deepcopy(model.config),
            dtype=model.dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_complete's error says more
        )
    _check_complete(path, info)
    if unexpected := sorted(info["unexpected_keys"]):
        raise PostTrainingError(
            f"{len(unexpected)} weights are none of this model's: {unexpected[0]}, …",
            where=str(path),
        )
    own, new = model.state_dict(), loaded.state_dict()
    for name, tensor in new.items():
        if name in own and own[name].dtype != tensor.dtype:  # it would be cast, unsaid
            raise PostTrainingError(
                f"{name} is {tensor.dtype}, must be {own[name].dtype}", where=str(path)
            )
    model.load_state_dict(new, strict=True)


def _spread(path: Path, size: int, plan: dict[str, str] | None = None) -> dict[str, Any]:
    """What from_pretrained needs for tensor parallelism by the architecture's own plan, with `plan`
    over it. Errors: PostTrainingError where it has none."""
    if size == 1:
        return {}
    settings = read_config(path)
    if not getattr(settings.get_text_config(), "base_model_tp_plan", None):
        raise PostTrainingError(
            f"models of the type {settings.model_type} can't be spread: transformers has no plan",
            where=str(path),
            hint="leave tensor_parallel_size at 1",
        )
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=plan)}


def _load(
    auto_class: type[Any],
    path: Path,
    dtype: str,
    attn_implementation: str,
    *,
    may_lack: AbstractSet[str] = frozenset(),
    **settings: Any,
) -> PreTrainedModel:
    """may_lack: names of weights. settings: of config.json, in place of its own."""
    read_model_settings(path)
    if (path / INDEX).exists():
        read_index(path)  # Errors: where it is none.
    register_varlen()
    with explain_errors(path, "the model can't be loaded"):
        model, info = auto_class.from_pretrained(
            path,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # its own error tells nothing; _check_complete's does
            **settings,
        )
    info["missing_keys"] = set(info["missing_keys"]) - may_lack
    _check_complete(path, info)
    note_left_out(model, path, info["unexpected_keys"])
    return model


def _check_complete(path: Path, info: dict[str, set]) -> None:
    """transformers draws missing weights at random, and only warns."""
    if missing := sorted(info["missing_keys"]):
        raise PostTrainingError(
            f"{len(missing)} weights are missing: {missing[0]}, …", where=str(path)
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise PostTrainingError(
            f"weights of another size than config.json says: {name} is {list(found)}, "
            f"must be {list(expected)}",
            where=str(path),
        )


def _check_generation(path: Path, model: PreTrainedModel) -> None:
    """transformers loads contradicting generation settings, and refuses to save them: now is
    better than at the first checkpoint."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        lines = [line for line in str(error).splitlines() if line.startswith("- ")]
        raise PostTrainingError(
            f"contradicting settings: {(lines or [str(error)])[0].removeprefix('- ')}",
            where=str(path / "generation_config.json"),
        ) from None


def check_ids_of_file(folder: Path, tokenizer: Any) -> None:
    """Whether a tokenizer gives the ids of its tokenizer.json, which the model was trained on.

    transformers builds a tokenizer anew by the class that config.json or tokenizer_config.json
    names, from no more than the vocabulary of tokenizer.json: by a class that is not the file's,
    spaces vanish or words are cut elsewhere, and nothing is said.

    Errors: PostTrainingError where the two give other ids of a text.
    """
    path = folder / _TOKENIZER_FILE
    if not path.exists():
        return  # It was made from another file, and there is nothing to compare.
    state = json.loads(path.read_text(encoding="utf-8"))
    state["truncation"] = state["padding"] = state["post_processor"] = None
    if state["model"].get("dropout"):
        return
    original = Tokenizer.from_str(json.dumps(state))
    tokens = [token["content"] for token in state["added_tokens"] if token["special"]]
    chosen = {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token in tokens}
    texts = [
        *_TEXTS,
        *(f"{token}{text}" for token in sorted(chosen or tokens[:1]) for text in _BEHIND_A_TOKEN),
    ]
    own = tokenizer(texts, add_special_tokens=False)["input_ids"]
    encodings = original.encode_batch(texts, add_special_tokens=False)
    for text, found, expected in zip(texts, own, (each.ids for each in encodings), strict=True):
        if found != expected:
            name = type(tokenizer).__name__
            pairs = zip(found, expected, strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            raise PostTrainingError(
                f"{_TOKENIZER_FILE} and the class that transformers takes, {name}, disagree on "
                f"the ids of {text!r}: {_shown(expected[alike:])} by the file, "
                f"{_shown(found[alike:])} by the class, after {alike} that are equal",
                where=str(folder),
                hint=_INSISTS if _named_class(folder) in _OF_THE_FILE else _NAME_IT,
            )


def _named_class(folder: Path) -> str | None:
    try:
        return json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except (OSError, ValueError):
        return None


def _shown(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:_MOST_TOKENS]))}{', …' if len(ids) > _MOST_TOKENS else ''}]"


def num_output_ids(path: Path) -> int | None:
    """How many ids a model of this folder can give, where they are fewer than it embeds."""
    settings = read_model_settings(path)
    of_text = settings.get("text_config", settings)
    number = of_text.get("output_vocab_size")
    return None if number == of_text.get("vocab_size") else number


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A token beyond the embedding would be an index error (on a GPU, an unreadable one)."""
    num_embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > num_embeddings:
        raise PostTrainingError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeds {num_embeddings}"
        )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        problem = "no such model folder" if not path.exists() else "is a file, not a model folder"
        raise PostTrainingError(problem, where=str(path))
    if (path / RECORD_NAME).exists():
        raise PostTrainingError(
            "the folder of a run, not of a model",
            where=str(path),
            hint=f"what it made is below: {path / 'model'}",
        )
    _check_no_code(path)


def _check_no_code(path: Path) -> None:
    """Errors: PostTrainingError for a folder that brings Python, or asks to run some."""
    files = sorted(file.name for file in path.glob("*.py"))
    asking = [name for name in _WITH_CODE if "auto_map" in _json_object(path / name)]
    if files or asking:
        what = f"{asking[0]} has an auto_map" if asking else f"it holds {files[0]}"
        raise PostTrainingError(
            f"the model brings code of its own, and none of it is ever run: {what}",
            where=str(path),
            hint="where transformers has the architecture itself, copy the folder, and take the "
            "*.py files and auto_map out of the copy",
        )


def _json_object(file: Path) -> dict[str, Any]:
    """Empty where there is no such file, or it is malformed: its reader says so."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_model_settings(path: Path) -> dict[str, Any]:
    """config.json of a model folder. Errors: PostTrainingError when it is none."""
    _check_folder(path)
    try:
        return read_json_object(path / "config.json")
    except FileNotFoundError:
        raise PostTrainingError("not a model: it has no config.json", where=str(path)) from None


@contextmanager
def explain_errors(path: Path, problem: str) -> Iterator[None]:
    """Reading a folder fails with whatever exception its content leads a library to (heads of 0, a
    size that no memory has); each is the folder's fault.

    Errors: PostTrainingError: `problem` and what the library said.
    """
    try:
        yield
    except PostTrainingError:
        raise
    except Exception as error:
        raise PostTrainingError(f"{problem}: {first_line(error)}", where=str(path)) from error
