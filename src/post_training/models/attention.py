"""Whether an attention implementation can do here what is asked of it.

A packed row tells its sequences apart by position ids that start again, without a mask. eager, sdpa
and flex_attention then mask what lies across (transformers' masking_utils). Flash attention has no
mask: it is given the sequences' bounds, which transformers finds in a batch of one row only
(modeling_flash_attention_utils, `_is_packed_sequence`); in a larger one it would let sequences see
each other and say nothing.
"""

from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from post_training.core.errors import PostTrainingError, UsageError

_KEY = "model.attn_implementation"
_FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
# Without dropout of attention weights: transformers stops at the first step, or leaves it out.
_WITHOUT_DROPOUT = ("flash_attention_3", "flex_attention")


def check_attention(
    implementation: str, *, computes_in_16_bits: bool, packed: bool, rows_in_one: bool
) -> None:
    """rows_in_one: a micro-batch is a single row. Errors: UsageError."""
    has_gpu = torch.cuda.is_available()
    if implementation in (*_FLASH_PACKAGES, "flex_attention") and not has_gpu:
        raise UsageError(
            f"{implementation} trains on GPUs only, and there is none here",
            where=_KEY,
            hint="sdpa and eager run everywhere",
        )
    if implementation not in _FLASH_PACKAGES:
        return
    if find_spec(_FLASH_PACKAGES[implementation]) is None:
        package = _FLASH_PACKAGES[implementation]
        raise UsageError(f"{implementation} needs {package}, which is not installed", where=_KEY)
    if not computes_in_16_bits:
        raise UsageError(
            f"{implementation} computes in 16 bits only",
            where=_KEY,
            hint="set training.mixed_precision: bf16, or model.dtype: bfloat16",
        )
    if packed and not rows_in_one:
        raise UsageError(
            f"{implementation} tells packed sequences apart only where a micro-batch is one row",
            where=_KEY,
            hint="set training.padding_free: true, or training.per_device_train_batch_size: 1",
        )


def check_dropout(model: PreTrainedModel, implementation: str) -> None:
    """Errors: UsageError when the model has a dropout that would be left out."""
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if dropout and implementation in _WITHOUT_DROPOUT:
        raise UsageError(
            f"{implementation} has no attention_dropout, and the model's is {dropout}",
            where=_KEY,
            hint="set it to 0 in the model's config.json, or take sdpa",
        )


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Change the first of two packed sequences, and see that the second doesn't notice.

    For a model with its weights on the CPU, in eager or sdpa. Some architectures leave the position
    ids unread (OPT, MPT, Mamba), and let sequences see each other.
    Errors: PostTrainingError for such a model.
    """
    length, num_ids = 4, model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(2 * length, device=device)[None] % num_ids
    other = torch.cat([(ids[:, :length] + length) % num_ids, ids[:, length:]], 1)
    positions = torch.arange(length, device=device).repeat(2)[None]
    was_training = model.training
    model.eval()
    first, second = (
        model(input_ids=each, position_ids=positions, use_cache=False).logits[:, length:]
        for each in (ids, other)
    )
    model.train(was_training)
    if not torch.equal(first, second):
        raise PostTrainingError(
            f"packed sequences see each other in models of the type {model.config.model_type}",
            where="model",
            hint="set sft.packing: none and training.padding_free: false",
        )
