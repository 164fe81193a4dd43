"""Prepare the data, train, write `RUN/model`.

RUN/data/          token ids, masks and rows (data/prepared/dataset.py)
RUN/evaluation/    the same, of the evaluation's rows
RUN/checkpoints/   checkpoint-N: weights, optimizer, schedule, random states, totals
RUN/inference_checkpoints/   step-N: what RUN/model would be after N steps
RUN/metrics.jsonl  one line each logging_steps, and one each evaluation
RUN/steps.jsonl    one line each step, by which two runs are compared
RUN/model/         the result, loadable by plain transformers
RUN/adapter/       with LoRA: what was trained, which RUN/model has merged into it
"""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.data.prepared.dataset import PreparedDataset, metrics_of
from post_training.data.rows import COMPLETION, PROMPT
from post_training.models.device import be_deterministic
from post_training.models.head import ChunkedHead
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Ranks, Result, StageContext, remove_leftovers
from post_training.train.config import SftConfig, SftLossConfig
from post_training.train.evaluation import Evaluation
from post_training.train.policy import load_policy
from post_training.train.session import Rows, run_training
from post_training.train.sft_loss import (
    Collator,
    MicroBatch,
    Sums,
    coefficients,
    factors,
    span_losses,
    token_losses,
)
from post_training.train.trainer import Count, Trainer


def run(config: SftConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.templates import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.prepared_data import DataPreparation
    from post_training.train.policy import check_requirements

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


# The trainer of `entrypoint sft`: the losses of losses.py on the model's chunked head.


class SftTrainer(Trainer):
    def __init__(self, *, loss: SftLossConfig, **others: Any):
        self._loss = loss
        self._factors = (0.0, 0.0)
        super().__init__(**others)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        own = sum((batch.sums for batch in batches), Sums())
        self._factors = factors(Sums(*self.all_ranks_sum(own.values())), self._loss)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, MicroBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the global batch's loss, times the number of ranks, over
        which gradients are averaged."""
        batch, device = inputs["batch"], self.args.device
        weights = coefficients(batch, *self._factors)
        scaled = (weights * self._context.ranks.world_size).to(device)
        targets = batch.targets.to(device)
        asked = {} if self.router is None else self.router.arguments
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        if self._loss.name == "irl":
            with self._head.scoring(targets):
                outputs = model(**inputs, **asked, use_cache=False)
            logprobs, values, _ = outputs.logits
            continues = batch.continues.to(device)
            loss = (scaled * token_losses(logprobs, values, continues, self._loss)).sum()
        else:
            with self._head.scoring(targets, scaled):
                outputs = model(**inputs, **asked, use_cache=False)
            loss, logprobs, _ = outputs.logits
        router_loss = None
        if self.router is not None:
            router_loss = self.router.of(outputs, batch.is_token.to(device))
        loss, of_router = self.with_router_loss(loss, router_loss)
        self.count(
            Count(
                loss=loss.detach(),
                rows=batch.rows,
                num_sequences=int(batch.sums.num_sequences),
                num_tokens=batch.num_tokens,
                num_trained_tokens=int((weights != 0).sum()),
                sum_of_squared_lengths=batch.sum_of_squared_lengths,
                sums={**_span_sums(batch, logprobs.detach(), weights != 0), **of_router},
            )
        )
        return loss

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        return span_losses(sums)


def _span_sums(batch: MicroBatch, logprobs: Tensor, looked_at: Tensor) -> dict[str, Tensor | float]:
    """Cross-entropy and number of tokens of prompts and completions, where it was looked at."""
    sums: dict[str, Tensor | float] = {}
    for name, kind in (("prompt", PROMPT), ("completion", COMPLETION)):
        mask = (batch.kinds == kind) & looked_at
        sums[f"{name}_loss"] = -(logprobs.double() * mask.to(logprobs.device)).sum()
        sums[f"num_{name}_tokens"] = float(mask.sum())
    return sums


# The training's own loss over a whole dataset, and prompts and completions apart.


_SPANS = (("prompt", PROMPT), ("completion", COMPLETION))
_OVERALL = ("num_prompt", "completion_weight", "num_sequences")  # in the order of Sums


class SftEvaluation(Evaluation):
    def __init__(self, collator: Collator, batch_size: int, ranks: Ranks):
        self._loss = collator.loss
        super().__init__(collator, len(collator.dataset), batch_size, ranks)

    def batch_sums(
        self, batch: MicroBatch, model: Any, head: ChunkedHead, device: torch.device
    ) -> dict[str, Tensor | float]:
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        with head.scoring(batch.targets.to(device), with_top=True):
            logprobs, values, tops = model(**inputs, use_cache=False).logits
        losses = token_losses(logprobs, values, batch.continues.to(device), self._loss).double()
        weights = batch.weights.to(device)
        sums: dict[str, Tensor | float] = dict(zip(_OVERALL, batch.sums.values(), strict=True))
        for name, kind in _SPANS:
            mask = (batch.kinds == kind).to(device).double()
            sums[f"weighted_{name}_loss"] = (mask * weights * losses).sum()
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
            for share, (name, _) in zip(shares, _SPANS, strict=True)
        )
        accuracies = {
            f"{name}_accuracy": sums[f"num_{name}_top"] / sums[f"num_{name}_tokens"]
            for name, _ in _SPANS
            if sums[f"num_{name}_tokens"]
        }
        return {"loss": loss, **span_losses(sums), **accuracies}


# From prepared rows to a model folder: the model, its loss, and the rows to train and evaluate.


def train(
    config: SftConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset,
    evaluation_dataset: PreparedDataset | None,
) -> Result:
    """Errors: see `run_training`."""
    be_deterministic()
    # Padding is no part of the attention or of the loss, so any id will do.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    collator = partial(
        Collator, loss=config.loss, pad_token_id=pad, padding_free=config.training.padding_free
    )
    evaluation, eval_steps = None, None
    if config.evaluation is not None and evaluation_dataset is not None:
        batch_size = config.evaluation.per_device_eval_batch_size
        evaluation = SftEvaluation(
            collator(evaluation_dataset, packed=False), batch_size, context.ranks
        )
        eval_steps = config.evaluation.eval_steps
    make_trainer = partial(
        SftTrainer,
        loss=config.loss,
        collator=collator(dataset, packed=config.rows_are_packed),
        evaluation=evaluation,
        eval_steps=eval_steps,
    )
    record = dataset.record
    rows = Rows(
        {**record["counts"], "num_rows": len(dataset)},
        dataset.template,
        shuffled=config.training.shuffle and not config.data.debug_oom,
        folders=("data", "evaluation"),
    )
    load = partial(
        load_policy,
        config,
        tokenizer,
        longest=config.sft.max_seq_length,
        where="sft.max_seq_length",
    )
    result = run_training(config, context, load, tokenizer, rows, make_trainer)
    return replace(result, metrics={**metrics_of(record), **result.metrics})
