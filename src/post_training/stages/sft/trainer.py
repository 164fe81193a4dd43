"""TRL's SFTTrainer with our order of rows, our checkpoints and our metrics.

The loss and its gradient are TRL's: cross-entropy summed over the trained tokens of the global
batch (all ranks, all accumulation steps), divided by their number. Overridden are methods the
pinned transformers calls at known places; tests/stages compares what comes out with a reference.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from post_training.core.errors import PostTrainingError
from post_training.core.files import write_json
from post_training.data.order import row_stream
from post_training.models.save import explained
from post_training.stages.context import StageContext
from post_training.stages.progress import Progress
from post_training.stages.sft.collator import IGNORED, Collator
from post_training.stages.training.checkpoints import Checkpoints
from post_training.stages.training.metrics import Metrics, Step, Totals

TOTALS = "totals.json"


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
    """shuffled: rows come in an order that `args.data_seed` decides, else as they are stored."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        collator: Collator,
        shuffled: bool,
        context: StageContext,
        checkpoints: Checkpoints,
        metrics: Metrics,
        progress: Progress,
    ):
        self._context = context
        self._checkpoints = checkpoints
        self._figures = metrics
        self._progress = progress
        self._effective_batch_size = (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * context.ranks.world_size
        )
        self._start_step()
        self._shuffled = shuffled
        super().__init__(
            model=model,
            args=args,
            # The rows' numbers; the collator reads the rows.
            train_dataset=Dataset.from_dict({"row": range(len(collator.dataset))}),
            processing_class=tokenizer,
            data_collator=collator,
        )
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """TRL would report the run to its makers."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL would write a README about itself with every checkpoint."""

    # The order of the rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowOrder:
        # One pass over this is the whole run: to the Trainer it is a single epoch.
        num_samples = self.args.max_steps * self._effective_batch_size
        seed = self.args.data_seed if self._shuffled else None
        return RowOrder(len(self.train_dataset), num_samples, seed)

    # Figures of a step

    def _start_step(self) -> None:
        # In float64, on the CPU: counts stay exact, and sums don't depend on how many there are.
        self._step_loss = torch.zeros((), dtype=torch.float64)
        self._step_tokens = 0
        self._step_trained_tokens = 0

    def get_batch_samples(self, *args: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, num_trained_tokens = super().get_batch_samples(*args)
        for batch in batches:
            self._step_tokens += batch.pop("num_tokens")
            self._step_trained_tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        return batches, num_trained_tokens

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._step_loss += loss.detach().double().cpu()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        # Called once a step, after the last micro-batch and before the optimizer's update.
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._end_step(float(grad_norm))
        return grad_norm

    def _end_step(self, grad_norm: float) -> None:
        number = self.state.global_step + 1
        sums = torch.stack(
            [
                self._step_loss,
                torch.tensor(self._step_tokens, dtype=torch.float64),
                torch.tensor(self._step_trained_tokens, dtype=torch.float64),
            ]
        )
        world_size = self._context.ranks.world_size
        sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").tolist()
        step = Step(
            step=number,
            epoch=number * self._effective_batch_size / len(self.train_dataset),
            # Each rank's loss is multiplied by their number, as DDP averages the gradients.
            loss=sums[0] / world_size,
            grad_norm=grad_norm,
            learning_rate=self._get_learning_rate(),
            num_tokens=int(sums[1]),
            num_trained_tokens=int(sums[2]),
        )
        self._stop_unless_finite(step)
        line = self._figures.add(step, last=number == self.args.max_steps)
        if line is not None:
            speed = line["timing"]["tokens_per_s"]
            self._progress.update(number, f"loss {line['loss']:.4f} · {speed:,.0f} tokens/s")
        self._start_step()
        self._metrics["train"].clear()  # TRL's own, which we don't log

    def _stop_unless_finite(self, step: Step) -> None:
        for name, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
            if not math.isfinite(value):
                raise PostTrainingError(
                    f"{name} is not finite at step {step.step} (got {value}); "
                    "stopped before the optimizer's update",
                    hint="lower training.learning_rate, raise training.warmup, or look at the data",
                )

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        with explained(self._checkpoints.folder):
            super()._save_checkpoint(model, trial)  # into the staging folder: args.output_dir
        # Every rank's random state has to be there before the folder counts as complete.
        self.accelerator.wait_for_everyone()
        self._context.on_writer(lambda: self._publish(step))

    def _publish(self, step: int) -> None:
        staged = self._checkpoints.staging / f"checkpoint-{step}"
        write_json(staged / TOTALS, asdict(self._figures.totals))
        (staged / "training_args.bin").unlink()  # paths of this run; not read on resume
        self._checkpoints.publish(step)


def read_totals(checkpoints: Checkpoints, step: int | None) -> Totals:
    if step is None:
        return Totals()
    return Totals(**json.loads((checkpoints.path(step) / TOTALS).read_text()))
