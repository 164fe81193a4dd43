"""One optimizer step, in order, on TRL's and transformers' Trainer.

    begin_step         look up this rank's micro-batches; add up what the loss divides by
    micro_batch_loss   forward pass and loss of one micro-batch; the library does the backward pass
    end_step           clipped, not yet updated: figures over all ranks, or a stop
                       (the library updates the weights, then the learning rate)
    after_update       evaluation, model for inference, checkpoint, an end that was asked for

The order of what these do is the order of the bits: of collectives, of sums, of what is written.
To change a step, edit them. The library calls them through the hooks in the second half of the
class; each says where from. tests/stack/train/test_hooks.py compares these calls with a list.
"""

import json
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float32
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from post_training.core.files import write_json
from post_training.data.order import row_stream
from post_training.data.prepared.dataset import UsedTemplate
from post_training.models.load import load_weights
from post_training.models.save import explain_write_errors, save_model_folder, stop_at
from post_training.stages.context import Progress, StageContext
from post_training.train import checksums
from post_training.train.arguments import (
    decayed_parameters,
    optimizer_class_and_arguments,
    row_groups,
    share_defaults,
    start_schedule_at,
)
from post_training.train.checkpoint import (
    INFERENCE_CHECKPOINTS,
    SIGNALS,
    Checkpoints,
    StopRequest,
)
from post_training.train.config import TrainingStageConfig
from post_training.train.loss import Collator, Evaluation, Loss, LossOutput, MicroBatch, Scalar
from post_training.train.metrics import (
    Metrics,
    MicroBatchLoss,
    Step,
    StepLog,
    Totals,
    rows_checksum,
    stop_unless_finite,
)
from post_training.train.policy import ADAPTER, export_model

TOTALS = "totals.json"
ROUTER_LOSS = "router_aux_loss"


@dataclass(frozen=True)
class TrainingData:
    """What is trained on.

    collator: from numbers of rows to a micro-batch.
    counts: num_rows, num_sequences and num_tokens.
    shuffled: rows come in an order that the seed decides, else as they are stored.
    template: that the rows were rendered with; None where they were tokens to begin with.
    folders: in RUN, whose files are part of the outcome.
    """

    collator: Collator
    counts: Mapping[str, int]
    shuffled: bool
    template: UsedTemplate | None
    folders: tuple[str, ...]


@dataclass(frozen=True)
class TrainingRun:
    """The parts of a run: session.py makes them, the Trainer reads them.

    arguments: the library's, made from config (arguments.py).
    model: as it is trained: with its adapter, where there is one.
    base: the folder the model was read from, if what it holds beside the model is to be kept.
    division: how training is divided among the ranks, which a checkpoint says.
    """

    config: TrainingStageConfig
    context: StageContext
    arguments: SFTConfig
    model: PreTrainedModel
    base: Path | None
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    loss: Loss
    evaluation: Evaluation | None
    checkpoints: Checkpoints
    division: checksums.Division
    metrics: Metrics
    step_log: StepLog
    progress: Progress
    stop: StopRequest


@dataclass(frozen=True)
class _Done:
    """A micro-batch whose forward and backward pass are done. loss: as it was differentiated."""

    batch: MicroBatch
    loss: Float32[Tensor, ""]
    output: LossOutput
    sums: dict[str, Scalar]


class Trainer(SFTTrainer):
    def __init__(self, run: TrainingRun):
        self._run = run
        self._context = run.context
        self._totals: list[float] = []
        self._done: list[_Done] = []
        # The library counts from 0; its folders and what it saves have that number.
        self._offset = run.config.training.iteration_offset
        self._finished_step = 0
        self._written: checksums.Checksums | None = None
        self._use_cache = run.model.config.use_cache
        self._effective_batch_size = (
            run.arguments.per_device_train_batch_size
            * run.arguments.gradient_accumulation_steps
            * row_groups(run.config, run.context.ranks).world_size
        )
        settings = run.model.config.get_text_config()
        outputs_router_logits = getattr(settings, "output_router_logits", None)
        super().__init__(
            model=run.model,
            args=run.arguments,
            # The rows' numbers; the collator reads the rows.
            train_dataset=Dataset.from_dict({"row": range(run.data.counts["num_rows"])}),
            processing_class=run.tokenizer,
            data_collator=run.data.collator,
            optimizer_cls_and_kwargs=optimizer_class_and_arguments(
                run.config.training, run.arguments.max_steps
            ),
        )
        if outputs_router_logits is not None:
            # TRL switches it on; a model that is saved so can't generate in plain transformers.
            settings.output_router_logits = outputs_router_logits
        # Our losses are divided by what the whole global batch has, so never by the accumulation.
        self.loss_is_scaled_for_ga = True
        self.remove_callback(PrinterCallback)

    # A step, in order.

    def begin_step(self, batches: list[MicroBatch]) -> None:
        """batches: this rank's of the coming step, still on the CPU."""
        loss = self._run.loss
        self._run.metrics.begin()
        self._done.clear()
        # As arrays: Python's own sum of floats is compensated from 3.12 on, which is other bits.
        own = sum(np.array(loss.totals(batch), np.float64) for batch in batches)
        self._totals = self._sum_over_ranks(own.tolist())
        if self.state.global_step == 0:
            first = batches[0].to(self.args.device)
            warning = loss.check_untrained(
                self.model_wrapped, first, lambda own: self.accelerator.gather(own[None])
            )
            if warning is not None:
                self._context.log(f"warning: {warning}")

    def micro_batch_loss(self, model: Any, batch: MicroBatch) -> Float32[Tensor, ""]:
        """This micro-batch's share of the global batch's loss, times the number of ranks: the
        library takes the mean of the ranks' gradients, where the sum is wanted."""
        world_size = self._context.ranks.world_size
        output = self._run.loss(model, batch.to(self.args.device), self._totals, world_size)
        loss, sums = output.loss, output.sums
        router = self._run.loss.router
        if router is not None and output.router_loss is not None:
            # A mean over the micro-batches of all ranks, as in TRL.
            share = router.coefficient / self.args.gradient_accumulation_steps
            loss = loss + share * output.router_loss.to(loss.dtype)
            sums = {**sums, ROUTER_LOSS: output.router_loss.detach()}
        self._done.append(_Done(batch, loss.detach(), output, sums))
        return loss

    def end_step(self, grad_norm: float) -> None:
        """grad_norm: before clipping, over the whole model.

        Errors: PostTrainingError, on every rank, where loss or gradient are not finite.
        """
        num_made = self.state.global_step + 1
        number = self._offset + num_made
        run, done, ranks = self._run, self._done, self._context.ranks
        rows = [row for each in done for row in each.batch.rows]
        own = {
            # Their mean over the ranks is the loss: that is how gradients are reduced.
            "loss": sum(each.loss.double().item() for each in done) / ranks.world_size,
            "num_sequences": sum(each.output.num_sequences for each in done),
            "num_tokens": sum(each.batch.num_tokens for each in done),
            "num_trained_tokens": sum(int(each.output.num_trained_tokens) for each in done),
            "sum_of_squared_lengths": sum(each.batch.sum_of_squared_lengths for each in done),
            "rows": rows_checksum(ranks.rank, rows),
        }
        sums = {name: sum(float(each.sums[name]) for each in done) for name in done[0].sums}
        # One collective. Its order counts: where a number stands may decide in which order more
        # than two ranks add it up.
        summed = self._sum_over_ranks([*own.values(), *run.stop.votes(), *sums.values()])
        votes_at, sums_at = len(own), len(own) + len(SIGNALS)
        of_all = dict(zip(own, summed[:votes_at], strict=True))
        sums = dict(zip(sums, summed[sums_at:], strict=True))
        # Ranks hear of a signal in different steps, and have to end in the same one.
        run.stop.agree(summed[votes_at:sums_at])
        of_router = {}
        if ROUTER_LOSS in sums:
            num_micro_batches = len(done) * ranks.world_size
            of_router[ROUTER_LOSS] = sums.pop(ROUTER_LOSS) / num_micro_batches
        step = Step(
            step=number,
            epoch=num_made * self._effective_batch_size / run.data.counts["num_rows"],
            loss=of_all["loss"],
            grad_norm=grad_norm,
            learning_rate=self._get_learning_rate(),
            num_rows=self._effective_batch_size,
            num_sequences=int(of_all["num_sequences"]),
            num_tokens=int(of_all["num_tokens"]),
            num_trained_tokens=int(of_all["num_trained_tokens"]),
            sum_of_squared_lengths=int(of_all["sum_of_squared_lengths"]),
            figures={**run.loss.figures(sums), **of_router},
        )
        losses = [MicroBatchLoss(float(each.loss), each.batch.rows) for each in done]
        stop_unless_finite(number, step.loss, grad_norm, losses, self._context)
        run.step_log.add(number, int(of_all["rows"]), step.loss, grad_norm)
        line = run.metrics.add(step, last=num_made == self.args.max_steps)
        if line is not None:
            speed = line["timing"]["tokens_per_s"]
            run.progress.update(number, f"loss {line['loss']:.4f} · {speed:,.0f} tokens/s")

    def after_update(self, num_made: int) -> None:
        """The weights are those after so many steps, from which all intervals are counted."""
        step = self._offset + num_made
        evaluation, checkpointing = self._run.evaluation, self._run.config.checkpointing
        # Before the checkpoint: a run resumed from it has the evaluation behind it.
        if evaluation is not None and evaluation.is_due(num_made, self.args.max_steps):
            self._evaluate_now(evaluation, step)
        inference_steps = checkpointing.inference_checkpoint_steps or 0
        if inference_steps > 0 and num_made % inference_steps == 0:
            folder = self._context.run_dir / INFERENCE_CHECKPOINTS
            self.save_model_to(folder / f"step-{step}")
        interval = self._run.config.training.exit_interval
        is_last = num_made == self.args.max_steps
        if interval is not None and num_made % interval == 0 and not is_last:
            self._context.log(f"training.exit_interval: stopping after step {step}")
            self._run.stop.ask_all(signal.SIGUSR1)
        if self._run.stop.is_agreed:
            self.control.should_save = self.control.should_training_stop = True

    def _evaluate_now(self, evaluation: Evaluation, step: int) -> None:
        own = evaluation.sums(self.model_wrapped, self.args.device)
        sums = dict(zip(own, self._sum_over_ranks(list(own.values())), strict=True))
        figures = evaluation.figures(sums)
        self._run.metrics.add_evaluation(step, figures)
        told = " · ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._context.log(f"evaluation at step {step}: {told}")

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    # The library's hooks: what TRL 1.16 and transformers 5.19 call, and where from. Overridden
    # methods are here and nowhere else.

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> "RowOrder":
        """Called from Trainer.get_train_dataloader, once. One pass over this is the whole run: to
        the library it is a single epoch."""
        num_samples = self.args.max_steps * self._effective_batch_size
        seed = self.args.data_seed if self._run.data.shuffled else None
        return RowOrder(
            self._run.data.counts["num_rows"],
            num_samples,
            seed,
            micro_batch=self.args.per_device_train_batch_size,
            num_sharing=self._run.config.distributed.context_parallel_size,
        )

    def get_decay_parameter_names(self, model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Called from Trainer.create_optimizer."""
        return decayed_parameters(model, super().get_decay_parameter_names(model, *args, **kwargs))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Called from Trainer._prepare_for_training; with ZeRO by DeepSpeed, on a copy of this."""
        is_new = self.lr_scheduler is None  # else DeepSpeed has made it by now
        if is_new:
            share_defaults(optimizer or self.optimizer)
        scheduler = super().create_scheduler(self._offset + num_training_steps, optimizer)
        if is_new and self._offset:
            start_schedule_at(scheduler, self._offset)
        return scheduler

    def _prepare_for_training(
        self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        """Called from Trainer._inner_training_loop, before the first step: model, optimizer and
        schedule are made or read."""
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, None)
        checkpoint = Path(resume_from_checkpoint)
        self._written = self._read_written(checkpoint)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._written is not None:
            problem = checksums.first_difference(self._written, self._state_checksums())
            checksums.refuse(problem, checkpoint, self._context)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Called from Trainer.train; with FSDP from Trainer._prepare_for_training. Not with ZeRO,
        where DeepSpeed reads the weights."""
        if self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # The library would pass over every name that it doesn't know: a mixture's experts have
            # other names in files than in memory.
            load_weights(self.model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called from Trainer._run_epoch, after the first `get_batch_samples` of a resumed run."""
        super()._load_rng_state(checkpoint)
        if self._written and self._written["random"]:
            found = {"random": checksums.random_checksums()}
            problem = checksums.first_difference(self._written, found)
            checksums.refuse(problem, Path(checkpoint), self._context)

    def get_batch_samples(self, *args: Any) -> tuple[list, None]:
        """Called from Trainer._run_epoch, first in each step. The second value would be what the
        library divides by."""
        batches, _ = super().get_batch_samples(*args)
        self.begin_step([batch["batch"] for batch in batches])
        return batches, None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, MicroBatch],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Float32[Tensor, ""]:
        """Called from Trainer.training_step, which then does the backward pass."""
        return self.micro_batch_loss(model, inputs["batch"])

    def floating_point_ops(self, inputs: Any) -> int:
        """Called from Trainer._run_epoch, after each backward pass. throughput.py counts them."""
        return 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called from Trainer._run_epoch, once a step: after the last backward pass and the
        clipping, before the optimizer's update."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.end_step(float(grad_norm))
        return grad_norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called from Trainer._run_epoch, once a step, after the update; and once more at the end
        of the epoch, which is that of the run."""
        with self._run.metrics.paused():
            if self.state.global_step != self._finished_step:
                self._finished_step = self.state.global_step
                self.after_update(self._finished_step)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called from Trainer._maybe_log_save_evaluate, where control.should_save."""
        num_made = self.state.global_step
        staged = self._run.checkpoints.staging / f"checkpoint-{num_made}"
        step = self._offset + num_made
        with explain_write_errors(self._run.checkpoints.folder):
            super()._save_checkpoint(model, trial)  # into the staging folder: args.output_dir
            self._write_checksums(staged)
        # Every rank's files have to be there before the folder counts as complete.
        self.accelerator.wait_for_everyone()
        with explain_write_errors(self._run.checkpoints.folder):
            self._context.on_writer(lambda: self._complete(staged))
            checksums.write_files(staged, self._run.division, self._context)
            self._context.on_writer(lambda: self._run.checkpoints.publish(staged, step))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Called from SFTTrainer._save_checkpoint: a README about TRL."""

    def _send_telemetry(self) -> None:
        """Called from TRL's constructor: the run would be reported to its makers."""

    # What a checkpoint has beside the library's own files.

    def _write_checksums(self, staged: Path) -> None:
        rank = self._context.ranks.rank
        state = self._state_checksums() if self._run.division.is_sharded or rank == 0 else {}
        own = {**state, "random": checksums.random_checksums()}
        checksums.write_rank(staged, rank, own)

    def _complete(self, staged: Path) -> None:
        self._context.inputs.check()  # Prepared data is read while it is trained on.
        self._run.step_log.sync()
        write_json(staged / TOTALS, asdict(self._run.metrics.totals))
        (staged / "training_args.bin").unlink()  # paths of this run; not read on resume

    def _read_written(self, checkpoint: Path) -> checksums.Checksums | None:
        """What this rank had in memory at the save. Errors: PostTrainingError for other names."""
        written = checksums.read_rank(checkpoint, self._run.division, self._context.ranks.rank)
        if written is None:
            self._context.log(
                f"warning: {checkpoint}: other processes shared the state when it was written, so "
                "what is read now can't be compared with what was in memory"
            )
            return None
        problem = checksums.first_other_name(written, self.model)
        checksums.refuse(problem, checkpoint, self._context)
        return written

    def _state_checksums(self) -> checksums.Checksums:
        return checksums.state_checksums(
            self.model,
            self.optimizer.optimizer,  # accelerate's wrapper has its own state dict
            self.lr_scheduler,
            is_deepspeed=self.is_deepspeed_enabled,
        )

    # The model that is trained, as a folder.

    def save_model_to(self, path: Path) -> None:
        """Write a folder that plain transformers loads. Every rank calls this: sharded weights are
        gathered."""
        weights = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            weights = self.accelerator.get_state_dict(self.model_wrapped)
        self.model.config.use_cache = self._use_cache  # the library turns it off for training
        self._context.on_writer(lambda: self._write_model(path, weights))

    def _write_model(self, path: Path, weights: dict[str, Tensor] | None) -> None:
        """weights: gathered from where they were sharded; None: the model's own."""
        run = self._run
        is_final = path.parent == self._context.run_dir
        adapter = path.with_name(ADAPTER if is_final else f"{path.name}-{ADAPTER}")
        model = export_model(run.config, run.model, adapter, weights)
        if run.data.template is not None:
            stop_at(model, run.tokenizer, run.data.template.end_of_turn)
        gathered = None if run.config.lora else weights
        warning = save_model_folder(path, model, run.tokenizer, gathered, base=run.base)
        if warning is not None:
            self._context.log(f"warning: {warning}")


class RowOrder(Sampler[int]):
    """The first `num_samples` of the endless stream over the rows; shuffled if there is a seed.

    Micro-batch after micro-batch goes to rank after rank, so that neighbours get the same rows
    where each comes `num_sharing` times."""

    def __init__(
        self,
        num_rows: int,
        num_samples: int,
        seed: int | None,
        *,
        micro_batch: int = 1,
        num_sharing: int = 1,
    ):
        self.num_rows, self.num_samples, self.seed = num_rows, num_samples, seed
        self.micro_batch, self.num_sharing = micro_batch, num_sharing

    def __len__(self) -> int:
        return self.num_samples * self.num_sharing

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        while rows := list(islice(stream, self.micro_batch)):
            for _ in range(self.num_sharing):
                yield from rows

    def _stream(self) -> Iterator[int]:
        if self.seed is None:
            return islice(cycle(range(self.num_rows)), self.num_samples)
        return islice(row_stream(self.num_rows, self.seed), self.num_samples)


def read_totals(checkpoints: Checkpoints, step: int | None) -> Totals:
    if step is None:
        return Totals()
    return Totals(**json.loads((checkpoints.path(step) / TOTALS).read_text()))
