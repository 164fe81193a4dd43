"""log π_ref of both answers of every pair: from the dataset, or computed once and kept.

    RUN/reference/   logprobs.npy    float64 [S, 2]: chosen and rejected of each pair, nats; NaN
                                     where a pair is in no row
                     reference.json  the model that it was computed with (models/reference.py)
    RUN/evaluation_reference/        the same, of the evaluation's pairs

The model that computes them is gone before the policy is read. Each pair is computed on its own, so
the bits do not depend on the number of ranks. A rank holds the whole model: for one that is larger
than a device, `entrypoint logprobs` writes them into the dataset.
"""

import gc
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError, UsageError
from post_training.core.files import atomic_directory
from post_training.data.pairs.dataset import REF_LOGPROB, Pair, PairDataset
from post_training.data.prepared.dataset import PreparedRow
from post_training.data.rows import COMPLETION
from post_training.models.device import explain_model_errors
from post_training.models.load import load_model
from post_training.models.reference import Reference, reference_of
from post_training.models.score import Asked, LogprobScorer
from post_training.stages.context import Progress, StageContext
from post_training.train.config import DpoConfig

LOGPROBS = "logprobs.npy"
_MAX_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class ReferenceLogprobs:
    """is_start: they are of the model that training starts from. computed:
    in this run."""

    values: Float64[np.ndarray, "S 2"]
    is_start: bool
    computed: bool


def reference_logprobs(
    config: DpoConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
    folder: Path,
) -> ReferenceLogprobs:
    """Every rank calls this, before the policy is read. folder: for those that are computed.

    Errors: UsageError where the settings and the dataset don't go together; PostTrainingError where
    the stored ones are of another model.
    """
    stored = np.array(dataset.figures[:, :, REF_LOGPROB])
    used = dataset.used_pairs()
    num_known = int((~np.isnan(stored[used]).any(1)).sum())
    if _takes_stored(config, dataset.folder, num_known, len(used)):
        context.on_writer(lambda: _check_stored(config, context, tokenizer, dataset))
        return ReferenceLogprobs(stored, is_start=True, computed=False)
    if not context.on_writer(folder.exists):  # complete, or it wouldn't be there
        values = _compute(config, context, dataset, used)
        context.on_writer(lambda: _write(folder, config, tokenizer, dataset, values))
    is_start = config.reference.ref_model_name_or_path is None
    return ReferenceLogprobs(np.load(folder / LOGPROBS), is_start, computed=True)


def _takes_stored(config: DpoConfig, folder: Path, num_known: int, num_used: int) -> bool:
    asked = config.reference.logprobs
    if asked == "computed" or config.reference.ref_model_name_or_path is not None:
        return False
    if num_known == num_used:
        return True
    if num_known == 0 and asked == "auto":
        return False
    raise UsageError(
        f"{num_known:,} of {num_used:,} pairs in {folder} have reference logprobs of the tokens "
        "that are trained (a pair that the limits cut has none)",
        where="reference.logprobs",
        hint="set reference.logprobs: computed, or complete them with `entrypoint logprobs`",
    )


def _check_stored(
    config: DpoConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
) -> None:
    template = dataset.template.text
    own = reference_of(config.model.path, tokenizer, template, config.model.dtype)
    for name, record in zip(dataset.source_names, dataset.record["references"], strict=True):
        if record is None:
            problem = f"no reference.json says which model made the reference logprobs of {name}"
            if config.reference.logprobs == "auto":
                raise UsageError(
                    problem,
                    where="reference.logprobs",
                    hint="set it to stored, and the first step alone checks them; or to computed",
                )
            context.log(f"warning: {problem}; only the first step checks them")
            continue
        made_by = Reference(**record)
        if made_by.dtype != own.dtype:
            context.log(
                f"reference: the logprobs of {name} were made in {made_by.dtype}, the model is "
                f"trained in {own.dtype}"
            )
        if made_by.backend != own.backend:
            context.log(f"reference: the logprobs of {name} were made by {made_by.backend}")
        replace(made_by, dtype=own.dtype).check(own, name)


def _compute(
    config: DpoConfig, context: StageContext, dataset: PairDataset, used: Int64[np.ndarray, " used"]
) -> Float64[np.ndarray, "S 2"]:
    """The ranks take the pairs in turn."""
    path = config.reference.ref_model_name_or_path or config.model.path
    context.log(f"reference: computing logprobs of {len(used):,} pairs with {path}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)  # bits depend on it
    # Deterministic either way; flash attention would need another layout of the cache, and some
    # architectures have no sdpa.
    attention = "eager" if config.model.attn_implementation == "eager" else "sdpa"
    model = load_model(path, dtype=config.model.dtype, attn_implementation=attention)
    model = model.to(device).eval()
    scorer = LogprobScorer(
        model,
        max_batch_tokens=_MAX_BATCH_TOKENS,
        prompts_per_batch=1,
        float32_logits=config.model.float32_logits,
    )
    in_16_bits = config.training.mixed_precision == "bf16"
    precision = torch.autocast(device.type, torch.bfloat16) if in_16_bits else nullcontext()
    values = np.zeros((dataset.num_pairs, 2))
    own = used[context.ranks.rank :: context.ranks.world_size]
    with (
        Progress("pair", len(own), shown=context.ranks.is_writer) as progress,
        precision,
        explain_model_errors(model, path),
    ):
        for done, number in enumerate(own.tolist(), 1):
            values[number] = _score(scorer, dataset.read_pair(number))
            progress.update(done)
    del scorer, model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if context.ranks.world_size > 1:
        import torch.distributed as dist

        # Each number is of one rank alone, and 0 on the others: the sum is exact.
        dist.all_reduce(torch.from_numpy(values), group=context.ranks.group)
    values[~np.isin(np.arange(len(values)), used)] = np.nan
    return values


def _score(scorer: LogprobScorer, pair: Pair) -> list[float]:
    answers = (pair.chosen, pair.rejected)
    if len(pair.prefix):
        prompts = [_asked(pair.prefix, answers)]
    else:  # the first token is the prompt of the others
        prompts = [_asked(each.ids[:1], (_rest(each),)) for each in answers]
    scored = scorer.score(prompts)
    return [each.logprob for of_prompt in scored for each in of_prompt]


def _asked(prefix: Int32[np.ndarray, " prefix"], answers: tuple[PreparedRow, ...]) -> Asked:
    return Asked(
        prefix.tolist(),
        [answer.ids.tolist() for answer in answers],
        [(answer.kinds == COMPLETION).tolist() for answer in answers],
    )


def _rest(answer: PreparedRow) -> PreparedRow:
    return PreparedRow(answer.ids[1:], answer.kinds[1:], None, (len(answer.ids) - 1,))


def _write(
    folder: Path,
    config: DpoConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PairDataset,
    values: Float64[np.ndarray, "S 2"],
) -> None:
    if not np.isfinite(values[dataset.used_pairs()]).all():
        number = int(dataset.used_pairs()[~np.isfinite(values[dataset.used_pairs()]).all(1)][0])
        raise PostTrainingError(f"a reference logprob is not finite (pair {number})")
    path = config.reference.ref_model_name_or_path or config.model.path
    with atomic_directory(folder) as temporary:
        np.save(temporary / LOGPROBS, values)
        reference_of(path, tokenizer, dataset.template.text, config.model.dtype).write(temporary)
