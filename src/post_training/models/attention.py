"""Whether a model and its attention can do here what is asked of them, and how long a text may be.

A packed row tells its sequences apart by position ids that start again, without a mask. eager, sdpa
and flex_attention then mask what lies across (transformers' masking_utils). Flash attention has no
mask: it is given the sequences' bounds, which transformers finds in a batch of one row only
(modeling_flash_attention_utils, `_is_packed_sequence`); in a larger one it would let sequences see
each other and say nothing. varlen has no mask either, and finds the bounds in any batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from post_training.core.errors import PostTrainingError, UsageError
from post_training.models.router_loss import RouterLoss
from post_training.models.varlen import VARLEN, check_varlen
from post_training.models.widened import computing_in_float32

_KEY = "model.attn_implementation"
_FLASH, _FLASH_PACKAGE = "flash_attention_2", "flash_attn"
_ON_CPU = ("eager", "sdpa", VARLEN)
# Without dropout of attention weights: they stop at the first step, or leave it out.
_WITHOUT_DROPOUT = (VARLEN, "flex_attention")
# tests/stack/train/test_requirements.py tries each of them.
KEEP_PACKED_APART = (
    "apertus",
    "gemma2",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# How many tokens a layer sees, by the names of config.json; and how many it does in the trial.
_SIZES = ("sliding_window", "attention_chunk_size", "index_topk")
_SHORT = 3
# As a share of a leak; and of the largest logit, by a prompt that is shared. Both are computed in
# float32, where rounding was seen to be up to 1e-6.
_MOST_SEEN = _MOST_CHANGED = 1e-3


def check_attention(
    implementation: str, *, computes_in_16_bits: bool, packed: bool, rows_in_one: bool
) -> None:
    """Whether an implementation can be had here for a training.

    packed: rows hold several sequences.
    rows_in_one: a micro-batch is a single row.
    Errors: UsageError where it can't.
    """
    has_gpu = torch.cuda.is_available()
    if implementation in (_FLASH, "flex_attention") and not has_gpu:
        raise UsageError(
            f"{implementation} trains on GPUs only, and there is none here",
            where=_KEY,
            hint="sdpa, eager and varlen run everywhere",
        )
    if implementation in (_FLASH, VARLEN) and has_gpu and not computes_in_16_bits:
        raise UsageError(
            f"{implementation} computes in 16 bits only",
            where=_KEY,
            hint="set training.mixed_precision: bf16, or model.dtype: bfloat16",
        )
    if implementation != _FLASH:
        return
    if find_spec(_FLASH_PACKAGE) is None:
        raise UsageError(
            f"{implementation} needs {_FLASH_PACKAGE}, which is not installed",
            where=_KEY,
            hint=f"{VARLEN} has FlashAttention's kernels inside, and needs no package",
        )
    if packed and not rows_in_one:
        raise UsageError(
            f"{implementation} tells packed sequences apart only where a micro-batch is one row",
            where=_KEY,
            hint="set training.padding_free: true, or training.per_device_train_batch_size: 1",
        )


def check_left_out(model: PreTrainedModel, implementation: str) -> None:
    """Errors: UsageError when the model has a dropout that would be left out; PostTrainingError
    when it has something else that `varlen` has not."""
    if implementation == VARLEN:
        check_varlen(model)
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if dropout and implementation in _WITHOUT_DROPOUT:
        raise UsageError(
            f"{implementation} has no attention_dropout, and the model's is {dropout}",
            where=_KEY,
            hint="set it to 0 in the model's config.json, or take sdpa",
        )


def check_packing(model: PreTrainedModel) -> None:
    """Whether a model keeps the sequences of a packed row apart.

    Some architectures leave the position ids unread (OPT, MPT, Mamba), and let packed sequences see
    each other; others cut a row into chunks, wherever its sequences begin (Llama 4). One that isn't
    known to keep them apart is tried.

    model: on the CPU. What needs a GPU is tried in eager: how an architecture hands on its position
    ids is the same.

    Errors: PostTrainingError for one that doesn't, or that can't be tried.
    """
    model_type = model.config.model_type
    settings = model.config.get_text_config()
    others = sorted({*(getattr(settings, "layer_types", None) or ())} - KNOWN_LAYERS)
    if others or getattr(settings, "index_topk", None) is not None:
        # What kind of layer it is says more than how much the trial would see.
        kind = others[0] if others else "sparse attention (index_topk)"
        problem = f"models of the type {model_type} have layers of the kind {kind}, which are not "
        problem += "known to keep packed sequences apart"
    elif model_type in KEEP_PACKED_APART:
        return
    elif _is_divided(model):
        problem = f"models of the type {model_type} aren't known to keep packed sequences apart, "
        problem += "and ZeRO-3 has divided this one before it could be tried"
    elif not (share := _tried(_seen_across_on_cpu, model, "packing")) <= _MOST_SEEN:
        problem = f"packed sequences see each other in models of the type {model_type}: "
        problem += f"they change each other by {share:.1%} of what one sequence would"
    else:
        return
    raise PostTrainingError(
        problem,
        where="model",
        hint="set packing: none (of sft or dpo) and training.padding_free: false",
    )


def check_shared_prompt(model: PreTrainedModel) -> None:
    """A mask of [T, T] is handed to the attention as it is, in place of the model's own: a sliding
    window would be forgotten. A model that isn't known to take it is tried.

    Errors: PostTrainingError for one that doesn't, or that can't be tried."""
    problem = None
    if has_window(model.config.get_text_config()):
        problem = "can't take the mask of a shared prompt: some layers have a mask of their own"
    elif RouterLoss.for_model(model) is not None:
        problem = "can't train their router's auxiliary loss with the mask of a shared prompt"
    elif model.config.model_type not in KEEP_PACKED_APART:
        if _is_divided(model):
            problem = "aren't known to take the mask of a shared prompt, and ZeRO-3 has divided "
            problem += "this one before it could be tried"
        elif (
            not (share := _tried(changed_by_sharing, model, "the mask of a shared prompt"))
            <= _MOST_CHANGED
        ):
            problem = f"don't take the mask of a shared prompt: logits differ by {share:.1%}"
    if problem is not None:
        raise PostTrainingError(
            f"models of the type {model.config.model_type} {problem}",
            where="model",
            hint="set dpo.share_prompt: false",
        )


def _tried(trial: Callable[[Any], float], model: PreTrainedModel, what: str) -> float:
    """What a trial finds; NaN, which no limit allows, for a model that gives NaN. Errors:
    PostTrainingError where the model's own code fails in the trial."""
    try:
        return trial(model)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        line = (str(error).strip() or "no reason given").splitlines()[0]
        raise PostTrainingError(
            f"{what} can't be tried in models of the type {model.config.model_type}: "
            f"{type(error).__name__}: {line}",
            where="model",
            hint="set packing: none, training.padding_free: false and dpo.share_prompt: false",
        ) from error


@torch.no_grad()
def changed_by_sharing(model: PreTrainedModel) -> float:
    """How much the logits of an answer differ from those it has alone, where it stands behind
    another answer to the same prompt; as a share of the largest.

    model: in eager or sdpa, on the CPU.
    """
    length = 4  # of the prompt and of each answer
    num_ids = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * length)[None] % num_ids
    branch = torch.arange(3).repeat_interleave(length)  # the prompt is 0
    positions = torch.cat([torch.arange(2 * length), torch.arange(length, 2 * length)])[None]
    sees = ((branch == 0) | (branch[:, None] == branch)).tril()[None, None]
    mask = sees
    if model.config._attn_implementation == "eager":
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(sees.shape).masked_fill(~sees, lowest)
    was_training = model.training
    model.eval()
    with computing_in_float32(model):
        shared = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        alone = model(input_ids=torch.cat([ids[:, :length], ids[:, -length:]], 1), use_cache=False)
    model.train(was_training)
    found, expected = (each.logits[:, -length:].float() for each in (shared, alone))
    return float((found - expected).abs().max() / expected.abs().max())


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layer sees only the last tokens. config: of the text model."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "sliding_window", None))


def _is_divided(model: PreTrainedModel) -> bool:
    """Whether ZeRO-3 has divided the weights among the ranks, which it marks so."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _seen_across_on_cpu(model: PreTrainedModel) -> float:
    implementation = model.config._attn_implementation
    if implementation in _ON_CPU:
        return seen_across(model)
    model.set_attn_implementation("eager")
    try:
        return seen_across(model)
    finally:
        model.set_attn_implementation(implementation)


@torch.no_grad()
def seen_across(model: PreTrainedModel) -> float:
    """Two packed sequences, one of them changed or at another place: how much the other notices, as
    a share of what it notices where both are one sequence. Rounding where they are kept apart;
    about 1 where nothing keeps them apart.

    They are longer than any window, chunk or index of the model, which are short ones meanwhile.
    It is computed in float32, whatever the weights' dtype.
    """
    num_ids = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    # No multiple of a chunk, so that a row's chunks are not those of its second sequence.
    length = 2 * _SHORT + 1
    first, changed, second = (torch.arange(length, device=device) + at * length for at in range(3))
    packed = torch.arange(length, device=device).repeat(2)
    joined = torch.arange(2 * length, device=device)

    def logits(ids: Int64[Tensor, " T"], positions: Int64[Tensor, " T"]) -> Float32[Tensor, "T V"]:
        inputs = {"input_ids": ids[None] % num_ids, "position_ids": positions[None]}
        return model(**inputs, use_cache=False).logits[0].float()

    was_training = model.training
    model.eval()
    with _short_windows(model), computing_in_float32(model):
        behind_first, behind_changed = (
            logits(torch.cat([each, second]), packed)[length:] for each in (first, changed)
        )
        in_front = logits(torch.cat([second, first]), packed)[:length]
        noticed = max(
            float((behind_first - each).abs().max()) for each in (behind_changed, in_front)
        )
        if noticed:
            one, other = (
                logits(torch.cat([each, second]), joined)[length:] for each in (first, changed)
            )
            noticed /= float((one - other).abs().max())
    model.train(was_training)
    return noticed


@contextmanager
def _short_windows(model: PreTrainedModel) -> Iterator[None]:
    """What a layer sees, cut to a few tokens: a real window would take thousands to cross."""
    settings = model.config.get_text_config()
    before = [
        (owner, name, size)
        for owner in (settings, *model.modules())
        for name in _SIZES
        if isinstance(size := vars(owner).get(name), int) and size > _SHORT
    ]
    for owner, name, _ in before:
        setattr(owner, name, _SHORT)
    try:
        yield
    finally:
        for owner, name, size in before:
            setattr(owner, name, size)


def most_positions(config: PreTrainedConfig) -> int | None:
    """Tokens of a text, at most; None where config.json sets no limit."""
    limits = [_positions(config), batch_limit(config)]
    return min((limit for limit in limits if limit is not None), default=None)


def batch_limit(config: PreTrainedConfig) -> int | None:
    """Tokens up to which a row doesn't depend on the rows beside it; None where it never does.

    With rotary embeddings of the kind `longrope` (Phi-3, Phi-4-mini) transformers takes one set of
    factors for all rows of a batch: the short ones, or the long ones as soon as one row goes beyond
    original_max_position_embeddings. A short row beside a long one, and an answer after a kept
    prompt, would then be those of another model; vLLM takes the long ones for every row once it may
    read so far. So no row may go beyond.
    """
    settings = config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    found = [
        kind.get("original_max_position_embeddings")
        or getattr(settings, "original_max_position_embeddings", None)
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min((limit for limit in found if limit is not None), default=None)


def check_positions(config: PreTrainedConfig, longest: int, *, where: str) -> None:
    """Errors: PostTrainingError when a row of `longest` tokens is too long for the model."""
    limit, own = most_positions(config), _positions(config)
    if limit is None or longest <= limit:
        return
    if own is not None and longest > own:
        problem, hint = f"must be ≤ {own}, the positions of the model (got {longest})", None
    else:
        problem = (
            f"must be ≤ {limit}, the model's original_max_position_embeddings (got {longest}): "
            "beyond it transformers computes all rows of a batch by other factors (longrope)"
        )
        hint = "use shorter rows; longer ones are not supported with this model"
    raise PostTrainingError(problem, where=where, hint=hint)


def _positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)
