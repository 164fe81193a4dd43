"""Supervised fine-tuning: prepare the data, train, write `RUN/model`.

RUN/data/          token ids, masks and rows (data/prepared/dataset.py)
RUN/evaluation/    the same, of the evaluation's rows
RUN/checkpoints/   checkpoint-N: weights, optimizer, schedule, random states, totals
RUN/inference_checkpoints/   step-N: what RUN/model would be after N steps
RUN/metrics.jsonl  one line each logging_steps, and one each evaluation
RUN/steps.jsonl    one line each step, by which two runs are compared
RUN/model/         the result, loadable by plain transformers
RUN/adapter/       with LoRA: what was trained, which RUN/model has merged into it
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Float32
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.files import remove_leftovers
from post_training.data.chat.templates import with_special_tokens
from post_training.data.prepared.dataset import PreparedDataset, metrics_of
from post_training.models.context_parallel import RowPart, share_rows
from post_training.models.device import be_deterministic
from post_training.models.head import ChunkedHead
from post_training.models.load import load_tokenizer, num_output_ids
from post_training.models.router_loss import RouterLoss
from post_training.stages.context import Ranks, Result, StageContext
from post_training.stages.prepared_data import DataPreparation
from post_training.train.arguments import join_row_group, row_groups
from post_training.train.config import SftConfig, SftLossConfig
from post_training.train.loss import Evaluation, Loss, LossOutput, Scalar
from post_training.train.policy import check_read, check_requirements, install_head, load_policy
from post_training.train.session import Session
from post_training.train.sft_loss import (
    SPANS,
    SftBatch,
    SftCollator,
    Sums,
    coefficients,
    factors,
    span_losses,
    token_losses,
)
from post_training.train.trainer import TrainingData

_OVERALL = ("num_prompt", "completion_weight", "num_sequences")  # in the order of Sums


def run(config: SftConfig, context: StageContext) -> Result:
    """Errors: UsageError and PostTrainingError of the settings, the data and the model; those of
    `Session.train`."""
    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data", "evaluation"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    data = DataPreparation(context, config.data, config.sft, tokenizer, config.seed)
    dataset, evaluation_dataset = data.open_or_prepare(), None
    if config.evaluation is not None:
        limits = config.sft.model_copy(update={"packing": "none"})
        evaluation_data = DataPreparation(
            context, config.evaluation_data(), limits, tokenizer, config.seed, "evaluation"
        )
        evaluation_dataset = evaluation_data.open_or_prepare()
    return train(config, context, tokenizer, dataset, evaluation_dataset)


def train(
    config: SftConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset,
    evaluation_dataset: PreparedDataset | None,
) -> Result:
    """From prepared rows to a model folder. Errors: see `Session.train`."""
    be_deterministic()
    part = join_row_group(config, context.ranks)
    data = TrainingData(
        collator=_collator(config, tokenizer, dataset, part, packed=config.rows_are_packed),
        counts={**dataset.record["counts"], "num_rows": len(dataset)},
        shuffled=config.training.shuffle and not config.data.debug_oom,
        template=dataset.template,
        folders=("data", "evaluation"),
    )
    session = Session.open(config, context, tokenizer, data)
    model = load_policy(
        config, tokenizer, longest=config.sft.max_seq_length, where="sft.max_seq_length"
    )
    check_read(config, context, model)
    if part is not None:
        share_rows(model, part)
    if (num_outputs := num_output_ids(config.model.path)) is not None:
        context.log(
            f"the model gives the ids below {num_outputs}: others are read, and not trained"
        )
    head = install_head(config, context, model)
    loss = SftLoss(config.loss, head, RouterLoss.for_model(model))
    evaluation = None
    if config.evaluation is not None and evaluation_dataset is not None:
        evaluation = SftEvaluation(
            _collator(config, tokenizer, evaluation_dataset, part, packed=False),
            config.evaluation.per_device_eval_batch_size,
            session.config.evaluation.eval_steps,
            row_groups(config, context.ranks),
            head,
        )
    result = session.train(model, loss, evaluation, base=config.model.path)
    return replace(result, metrics={**metrics_of(dataset.record), **result.metrics})


def _collator(
    config: SftConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset,
    part: RowPart | None,
    *,
    packed: bool,
) -> SftCollator:
    return SftCollator(
        dataset,
        config.loss,
        # Padding is no part of the attention or of the loss, so any id will do.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        packed=packed,
        padding_free=config.training.padding_free,
        pad_to_multiple_of=config.training.pad_to_multiple_of,
        num_outputs=num_output_ids(config.model.path),
        part=part,
    )


class SftLoss(Loss):
    """The losses of sft_loss.py, on the model's chunked head."""

    def __init__(self, config: SftLossConfig, head: ChunkedHead, router: RouterLoss | None):
        self._config = config
        self._head = head
        self.router = router

    def totals(self, batch: SftBatch) -> Sequence[float]:
        return batch.sums.values()

    def __call__(
        self, model: Any, batch: SftBatch, totals: Sequence[float], scale: float
    ) -> LossOutput:
        weights = coefficients(batch, *factors(Sums(*totals), self._config))
        asked = {} if self.router is None else self.router.arguments
        if self._config.name == "irl":
            with self._head.scoring(batch.targets):
                outputs = model(**batch.inputs, **asked, use_cache=False)
            logprobs, values, _ = outputs.logits
            losses = token_losses(logprobs, values, batch.continues, self._config)
            loss = (weights * scale * losses).sum()
        else:
            # Coefficients known beforehand: the head makes the gradient along with the loss.
            with self._head.scoring(batch.targets, weights * scale):
                outputs = model(**batch.inputs, **asked, use_cache=False)
            loss, logprobs, _ = outputs.logits
        is_trained = weights != 0
        return LossOutput(
            loss=loss,
            num_sequences=int(batch.sums.num_sequences),
            num_trained_tokens=is_trained.sum(),
            sums=_span_sums(batch, logprobs.detach(), is_trained),
            router_loss=None if self.router is None else self.router.of(outputs, batch.is_token),
        )

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        return span_losses(sums)


def _span_sums(
    batch: SftBatch, logprobs: Float32[Tensor, "B T"], is_trained: Bool[Tensor, "B T"]
) -> dict[str, Scalar]:
    """Cross-entropy and number of trained tokens of prompts and completions."""
    sums: dict[str, Scalar] = {}
    for name, kind in SPANS:
        mask = (batch.kinds == kind) & is_trained
        sums[f"{name}_loss"] = -(logprobs.double() * mask).sum()
        sums[f"num_{name}_tokens"] = mask.sum()
    return sums


class SftEvaluation(Evaluation):
    """The training's own loss over a whole dataset, and prompts and completions apart."""

    def __init__(
        self,
        collator: SftCollator,
        batch_size: int,
        eval_steps: int | None,
        ranks: Ranks,
        head: ChunkedHead,
    ):
        self._loss = collator.loss
        self._head = head
        super().__init__(collator, len(collator.dataset), batch_size, eval_steps, ranks)

    def batch_sums(self, batch: SftBatch, model: Any) -> dict[str, Scalar]:
        with self._head.scoring(batch.targets, with_top=True):
            logprobs, values, tops = model(**batch.inputs, use_cache=False).logits
        losses = token_losses(logprobs, values, batch.continues, self._loss).double()
        sums: dict[str, Scalar] = dict(zip(_OVERALL, batch.sums.values(), strict=True))
        for name, kind in SPANS:
            mask = (batch.kinds == kind).double()
            sums[f"weighted_{name}_loss"] = (mask * batch.weights * losses).sum()
            sums[f"{name}_loss"] = -(mask * logprobs.double()).sum()
            sums[f"num_{name}_tokens"] = mask.sum()
            sums[f"num_{name}_top"] = (mask * tops).sum()
        return sums

    def figures(self, sums: dict[str, float]) -> dict[str, float]:
        """loss; prompt_loss, prompt_accuracy, completion_loss, completion_accuracy: means over
        the tokens, whatever their weights; an accuracy counts where the target is the likeliest."""
        overall = Sums(*(sums[name] for name in _OVERALL))
        shares = factors(overall, self._loss)
        loss = sum(
            share * sums[f"weighted_{name}_loss"]
            for share, (name, _) in zip(shares, SPANS, strict=True)
        )
        accuracies = {
            f"{name}_accuracy": sums[f"num_{name}_top"] / sums[f"num_{name}_tokens"]
            for name, _ in SPANS
            if sums[f"num_{name}_tokens"]
        }
        return {"loss": loss, **span_losses(sums), **accuracies}
