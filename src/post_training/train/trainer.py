"""TRL's SFTTrainer with our order of rows, our global batch, our checkpoints and our metrics.

    get_batch_samples    the micro-batches of a step; what they have together -> `prepare_step`
    compute_loss         one micro-batch; a subclass's, whose sum over all of them is the loss
    _get_grad_norm       after the last micro-batch, before the update: figures, or a stop
    _maybe_log_save_…    after the update: evaluation, checkpoint, an end that was asked for

Overridden are methods the pinned transformers calls at known places; tests/stack compares what
comes out with a reference.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from post_training.core.files import write_json
from post_training.data.order import row_stream
from post_training.models.head import ChunkedHead
from post_training.models.load import load_weights
from post_training.models.router_loss import RouterLoss, coefficient_of
from post_training.models.save import explained
from post_training.stages.context import Progress, StageContext
from post_training.train import checksums
from post_training.train.arguments import decayed_parameters
from post_training.train.checkpoint import SIGNALS, Checkpoints, StopRequest
from post_training.train.evaluation import Evaluation
from post_training.train.metrics import (
    Metrics,
    MicroBatchLoss,
    Step,
    StepLog,
    Totals,
    rows_checksum,
    stop_unless_finite,
)

TOTALS = "totals.json"
ROUTER_LOSS = "router_aux_loss"


@dataclass(frozen=True)
class Count:
    """Of one micro-batch on this rank. loss: as it is differentiated. rows: of the dataset.
    sums: further figures, which add up over micro-batches and ranks."""

    loss: Tensor
    rows: tuple[int, ...]
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    sum_of_squared_lengths: int
    sums: dict[str, Tensor | float]


_COUNTS = ("num_sequences", "num_tokens", "num_trained_tokens", "sum_of_squared_lengths")


class RowOrder(Sampler[int]):
    """The first `num_samples` of the endless stream over the rows; shuffled if there is a seed."""

    def __init__(self, num_rows: int, num_samples: int, seed: int | None):
        self.num_rows, self.num_samples, self.seed = num_rows, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return islice(cycle(range(self.num_rows)), self.num_samples)
        return islice(row_stream(self.num_rows, self.seed), self.num_samples)


class Trainer(SFTTrainer):
    """The base of every stage's trainer.

    A subclass has `compute_loss`, which calls `count` once, and may have `prepare_step` and
    `derived_figures`.

    head: of the model; None where the loss needs none.
    collator: from [{"row": number}, …] to {"batch": whatever the subclass works on}.
    shuffled: rows come in an order that `args.data_seed` decides, else as they are stored.
    division: how the training is divided, which a checkpoint says.
    save_model: writes the model, on rank 0; gets the weights where they had to be gathered.
    inference_steps: steps between two models for inference; None or ≤ 0: none.
    evaluation: done every `eval_steps`, and at the end.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        head: ChunkedHead | None,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        collator: Callable[[list[dict[str, int]]], dict[str, Any]],
        num_rows: int,
        shuffled: bool,
        context: StageContext,
        checkpoints: Checkpoints,
        division: checksums.Division,
        metrics: Metrics,
        step_log: StepLog,
        progress: Progress,
        stop: StopRequest,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]],
        save_model: Callable[[Path, dict[str, Tensor] | None], None],
        inference_steps: int | None,
        inference_folder: Path,
        evaluation: Evaluation | None = None,
        eval_steps: int | None = None,
    ):
        self._head = head
        self._context = context
        self._checkpoints = checkpoints
        self._division = division
        self._written: checksums.Checksums | None = None
        self._figures = metrics
        self._step_log = step_log
        self._progress = progress
        self._stop = stop
        self._effective_batch_size = (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * context.ranks.world_size
        )
        self._shuffled = shuffled
        self._counted: list[Count] = []
        self._finished_step = 0
        self._inference_steps = inference_steps or 0
        self._inference_folder = inference_folder
        self._evaluation = evaluation
        self._eval_steps = eval_steps
        self._save_model = save_model
        self._use_cache = model.config.use_cache
        self.router = RouterLoss.for_model(model)
        self._tell_router_loss(model)
        settings = model.config.get_text_config()
        outputs_router_logits = getattr(settings, "output_router_logits", None)
        super().__init__(
            model=model,
            args=args,
            # The rows' numbers; the collator reads the rows.
            train_dataset=Dataset.from_dict({"row": range(num_rows)}),
            processing_class=tokenizer,
            data_collator=collator,
            optimizer_cls_and_kwargs=optimizer,
        )
        if outputs_router_logits is not None:
            # TRL switches it on; a model that is saved so can't generate in plain transformers.
            settings.output_router_logits = outputs_router_logits
        # Our losses are divided by what the whole global batch has, so never by the accumulation.
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """TRL would report the run to its makers."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write a README about itself with every checkpoint."""

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # throughput.py counts them

    def all_ranks_sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    # The order of the rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowOrder:
        # One pass over this is the whole run: to the Trainer it is a single epoch.
        num_samples = self.args.max_steps * self._effective_batch_size
        seed = self.args.data_seed if self._shuffled else None
        return RowOrder(len(self.train_dataset), num_samples, seed)

    # A step

    def prepare_step(self, batches: list[Any]) -> None:
        """Look at this rank's micro-batches of the coming step."""

    def get_decay_parameter_names(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        return decayed_parameters(model, super().get_decay_parameter_names(model, *args, **kwargs))

    def derived_figures(self, sums: dict[str, float]) -> dict[str, float]:
        """Further figures of a step, from the sums of `Count.sums` over all ranks."""
        return {}

    def with_router_loss(
        self, loss: Tensor, router_loss: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """loss: of a micro-batch, as it is differentiated; and sums for its `Count`. The router's
        is a mean over the micro-batches of all ranks, as in TRL."""
        if self.router is None or router_loss is None:
            return loss, {}
        share = self.router.coefficient / self.args.gradient_accumulation_steps
        return loss + share * router_loss.to(loss.dtype), {ROUTER_LOSS: router_loss.detach()}

    def _tell_router_loss(self, model: PreTrainedModel) -> None:
        if self.router is not None:
            self._context.log(
                f"the router's auxiliary loss is trained, times {self.router.coefficient:g} "
                "(router_aux_loss_coef in config.json; 0 there leaves it out)"
            )
        elif coefficient := coefficient_of(model):
            self._context.log(
                f"warning: config.json has router_aux_loss_coef: {coefficient:g}, and the router's "
                f"auxiliary loss is not trained: {type(model).__name__} gives none"
            )

    def count(self, counted: Count) -> None:
        """To be called by `compute_loss`."""
        self._counted.append(counted)

    def get_batch_samples(self, *args: Any) -> tuple[list, None]:
        batches, _ = super().get_batch_samples(*args)
        self._figures.begin()
        self._counted.clear()
        self.prepare_step([batch["batch"] for batch in batches])
        return batches, None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once a step, after the last micro-batch and before the optimizer's update.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._end_step(float(grad_norm))
        return grad_norm

    def _end_step(self, grad_norm: float) -> None:
        number = self.state.global_step + 1
        counted = self._counted
        names = list(counted[0].sums)
        rows = [row for count in counted for row in count.rows]
        own = [
            # Their mean over the ranks is the loss: that is how gradients are reduced.
            sum(count.loss.double().item() for count in counted) / self._context.ranks.world_size,
            *(sum(getattr(count, name) for count in counted) for name in _COUNTS),
            rows_checksum(self._context.ranks.rank, rows),
            *self._stop.votes(),
            *(sum(float(count.sums[name]) for count in counted) for name in names),
        ]
        loss, *summed = self.all_ranks_sum(own)
        num_sequences, num_tokens, num_trained_tokens, squares, checksum = map(int, summed[:5])
        votes, sums = summed[5 : 5 + len(SIGNALS)], summed[5 + len(SIGNALS) :]
        self._stop.agree(votes)
        named = dict(zip(names, sums, strict=True))
        figures = {}
        if ROUTER_LOSS in named:
            num_micro_batches = len(counted) * self._context.ranks.world_size
            figures[ROUTER_LOSS] = named.pop(ROUTER_LOSS) / num_micro_batches
        step = Step(
            step=number,
            epoch=number * self._effective_batch_size / len(self.train_dataset),
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=self._get_learning_rate(),
            num_rows=self._effective_batch_size,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            num_trained_tokens=num_trained_tokens,
            sum_of_squared_lengths=squares,
            figures={**self.derived_figures(named), **figures},
        )
        losses = [MicroBatchLoss(float(count.loss), count.rows) for count in counted]
        stop_unless_finite(number, loss, grad_norm, losses, self._context)
        self._step_log.add(number, checksum, loss, grad_norm)
        line = self._figures.add(step, last=number == self.args.max_steps)
        if line is not None:
            speed = line["timing"]["tokens_per_s"]
            self._progress.update(number, f"loss {line['loss']:.4f} · {speed:,.0f} tokens/s")
        self._metrics["train"].clear()  # TRL's own, which we don't log

    def _evaluate_now(self, step: int) -> None:
        """After `step`, if it is time to."""
        is_due = self._eval_steps is not None and step % self._eval_steps == 0
        if self._evaluation is None or not (is_due or step == self.args.max_steps):
            return
        own = self._evaluation.sums(self.model_wrapped, self._head, self.args.device)
        sums = zip(own, self.all_ranks_sum(list(own.values())), strict=True)
        figures = self._evaluation.figures(dict(sums))
        self._figures.add_evaluation(step, figures)
        told = " · ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._context.log(f"evaluation at step {step}: {told}")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        with self._figures.paused():
            if self.state.global_step != self._finished_step:  # called once more at the very end
                self._finished_step = self.state.global_step
                self._finish_step(self._finished_step)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_step(self, step: int) -> None:
        # Before the checkpoint: a run resumed from it has the evaluation behind it.
        self._evaluate_now(step)
        if self._inference_steps > 0 and step % self._inference_steps == 0:
            self.save_model_to(self._inference_folder / f"step-{step}")
        if self._stop.is_agreed:
            self.control.should_save = self.control.should_training_stop = True

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        staged = self._checkpoints.staging / f"checkpoint-{step}"
        with explained(self._checkpoints.folder):
            super()._save_checkpoint(model, trial)  # into the staging folder: args.output_dir
            self._write_checksums(staged)
        # Every rank's files have to be there before the folder counts as complete.
        self.accelerator.wait_for_everyone()
        with explained(self._checkpoints.folder):
            self._context.on_writer(lambda: self._complete(staged))
            checksums.write_files(staged, self._division, self._context)
            self._context.on_writer(lambda: self._checkpoints.publish(step))

    def _write_checksums(self, staged: Path) -> None:
        rank = self._context.ranks.rank
        state = self._state_checksums() if self._division.is_sharded or rank == 0 else {}
        own = {**state, "random": checksums.random_checksums()}
        checksums.write_rank(staged, rank, own)

    def _complete(self, staged: Path) -> None:
        self._context.inputs.check()  # Prepared data is read while it is trained on.
        self._step_log.sync()
        write_json(staged / TOTALS, asdict(self._figures.totals))
        (staged / "training_args.bin").unlink()  # paths of this run; not read on resume

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # The Trainer would pass over every name that it doesn't know: a mixture's experts have
            # other names in files than in memory.
            load_weights(self.model, Path(resume_from_checkpoint))

    def _prepare_for_training(
        self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        checkpoint = Path(resume_from_checkpoint)
        written = checksums.read_rank(checkpoint, self._division, self._context.ranks.rank)
        self._written = written  # for the random state, which is read later
        if written is None:
            self._context.log(
                f"warning: {checkpoint}: other processes shared the state when it was written, so "
                "what is read now can't be compared with what was in memory"
            )
        else:
            problem = checksums.first_other_name(written, self.model)
            checksums.refuse(problem, checkpoint, self._context)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if written is not None:
            problem = checksums.first_difference(written, self._state_checksums())
            checksums.refuse(problem, checkpoint, self._context)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self._written and self._written["random"]:
            found = {"random": checksums.random_checksums()}
            problem = checksums.first_difference(self._written, found)
            checksums.refuse(problem, Path(checkpoint), self._context)

    def _state_checksums(self) -> checksums.Checksums:
        return checksums.state_checksums(
            self.model,
            self.optimizer.optimizer,  # accelerate's wrapper has its own state dict
            self.lr_scheduler,
            is_deepspeed=self.is_deepspeed_enabled,
        )

    # Models for inference

    def save_model_to(self, path: Path) -> None:
        """Write a folder that plain transformers loads. Every rank calls this: sharded weights are
        gathered."""
        weights = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        self.model.config.use_cache = self._use_cache  # the Trainer turns it off for training
        self._context.on_writer(lambda: self._save_model(path, weights))


def read_totals(checkpoints: Checkpoints, step: int | None) -> Totals:
    if step is None:
        return Totals()
    return Totals(**json.loads((checkpoints.path(step) / TOTALS).read_text()))
