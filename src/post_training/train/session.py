"""A training run from prepared data to RUN/model: what is the same for every training stage.

session = Session.open(…)    the checkpoint to go on from, the library's arguments, the folder
model = …                    the stage reads it: with ZeRO-3 already divided among the ranks
session.train(model, …)      to the end, or to the checkpoint that a signal asked for
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig

from post_training.config.model import Role, settings_by_role
from post_training.core.errors import UsageError
from post_training.core.files import remove_leftovers, write_json
from post_training.models.device import explain_model_errors
from post_training.models.router_loss import coefficient_of
from post_training.records.run_record import METRICS_NAME, STEPS_NAME
from post_training.stages.context import Progress, Result, StageContext
from post_training.train.arguments import (
    join_ranks,
    row_groups,
    strategy_settings,
    training_arguments,
)
from post_training.train.checkpoint import (
    INFERENCE_CHECKPOINTS,
    MARKER,
    Checkpoints,
    StopRequest,
    open_inference_checkpoints,
)
from post_training.train.checksums import FILES, Division, check_files
from post_training.train.config import TrainingStageConfig
from post_training.train.loss import Evaluation, Loss
from post_training.train.metrics import Metrics, StepLog, num_steps_made
from post_training.train.policy import (
    ADAPTER,
    add_lora,
    artifacts,
    describe_adapter,
)
from post_training.train.reporters import Reporters, open_reporters
from post_training.train.throughput import ModelFlops, Throughput, model_flops, peak_flops_per_s
from post_training.train.trainer import Trainer, TrainingData, TrainingRun, read_totals
from post_training.train.training_config import accumulation_steps


@dataclass(frozen=True)
class Session:
    """What is known of a run before its model is read. resume_step: None where it begins anew."""

    config: TrainingStageConfig
    context: StageContext
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    arguments: SFTConfig
    checkpoints: Checkpoints
    resume_step: int | None
    division: Division

    @classmethod
    def open(
        cls,
        config: TrainingStageConfig,
        context: StageContext,
        tokenizer: PreTrainedTokenizerBase,
        data: TrainingData,
    ) -> "Session":
        """Look for the newest checkpoint and make the run folder ready. Every rank calls it.

        tokenizer: gets the template of the data, and is saved with it.
        Errors: UsageError for a checkpoint that can't be gone on from, or settings that don't fit.
        """
        if data.template is not None:
            tokenizer.chat_template = data.template.text
        num_steps = config.training.num_steps(data.counts)
        config = config.in_steps(data.counts["num_rows"])
        num_accumulated = accumulation_steps(
            config.training, row_groups(config, context.ranks).world_size
        )
        checkpoints = Checkpoints(
            context.run_dir / "checkpoints", config.checkpointing.save_total_limit
        )
        resume_step = context.on_writer(lambda: _resume_step(config, context.run_dir, checkpoints))
        division = Division(config.distributed.strategy, context.ranks.world_size)
        if resume_step is not None:
            check_files(checkpoints.path(resume_step), division, context)
        join_ranks(config)
        # Before the model is read: with ZeRO-3 no rank ever holds it whole.
        arguments = training_arguments(config, checkpoints.staging, num_steps, num_accumulated)
        settings = strategy_settings(arguments)
        context.on_writer(lambda: _open_folder(config, context.run_dir, settings))
        return cls(config, context, tokenizer, data, arguments, checkpoints, resume_step, division)

    def train(
        self,
        model: PreTrainedModel,
        loss: Loss,
        evaluation: Evaluation | None = None,
        *,
        base: Path | None = None,
    ) -> Result:
        """Train to the end, from the newest checkpoint where there is one, and write RUN/model.

        model: read just now, without adapter.
        base: the folder it was read from, if what that holds beside the model is to be kept.
        Errors: Interrupted when a signal asked for an end, once the checkpoint is written.
        """
        config, context = self.config, self.context
        model = add_lora(config, model)
        of_adapter = describe_adapter(config, model, context)
        flops = model_flops(model)
        stop = StopRequest(tells=context.ranks.is_writer)
        with (
            open_reporters(config.logging, context, _shown_settings(config)) as reporters,
            Progress(
                "step",
                self.last_step,
                shown=context.ranks.is_writer,
                done=self.resume_step or self.offset,
            ) as progress,
            stop.listening(),
        ):
            run = TrainingRun(
                config=config,
                context=context,
                arguments=self.arguments,
                model=model,
                base=base,
                tokenizer=self.tokenizer,
                data=self.data,
                loss=loss,
                evaluation=evaluation,
                checkpoints=self.checkpoints,
                division=self.division,
                metrics=self._metrics(flops, reporters),
                step_log=self._step_log(),
                progress=progress,
                stop=stop,
            )
            if self.resume_step is not None:
                context.log(f"resuming from step {self.resume_step} of {self.last_step}")
            self._tell_router_loss(run)
            trainer = Trainer(run)
            self._run_steps(trainer)
            step = self.offset + trainer.state.global_step
            if step < self.last_step:
                context.log(
                    f"step {step} of {self.last_step} is saved; the same command goes on from there"
                )
                raise stop.end(step, self.last_step)
            trainer.save_model_to(context.run_dir / "model")
        return self._result(run.metrics, of_adapter)

    @property
    def num_steps(self) -> int:
        """Steps that this run makes."""
        return self.arguments.max_steps

    @property
    def offset(self) -> int:
        return self.config.training.iteration_offset

    @property
    def last_step(self) -> int:
        """The number of the last step."""
        return self.offset + self.num_steps

    def _metrics(self, flops: ModelFlops | None, reporters: Reporters) -> Metrics:
        config, context = self.config, self.context
        metrics = Metrics(
            context.run_dir / METRICS_NAME if context.ranks.is_writer else None,
            config.logging.logging_steps,
            Throughput(flops, _peak(config, context)),
            reporters,
            offset=self.offset,
        )
        metrics.resume(self.resume_step or 0, read_totals(self.checkpoints, self.resume_step))
        return metrics

    def _step_log(self) -> StepLog:
        log = StepLog(self.context.run_dir if self.context.ranks.is_writer else None)
        log.resume(0 if self.resume_step is None else self.resume_step - self.offset)
        return log

    def _tell_router_loss(self, run: TrainingRun) -> None:
        if run.loss.router is not None:
            self.context.log(
                f"the router's auxiliary loss is trained, times {run.loss.router.coefficient:g} "
                "(router_aux_loss_coef in config.json; 0 there leaves it out)"
            )
        elif coefficient := coefficient_of(run.model):
            self.context.log(
                f"warning: config.json has router_aux_loss_coef: {coefficient:g}, and the router's "
                f"auxiliary loss is not trained: {type(run.model).__name__} gives none"
            )

    def _run_steps(self, trainer: Trainer) -> None:
        if self.config.num_threads is not None:
            # accelerate may have chosen another number, and bits depend on it.
            torch.set_num_threads(self.config.num_threads)
        resume_from = None
        if self.resume_step is not None:
            resume_from = str(self.checkpoints.path(self.resume_step))
        try:
            with explain_model_errors(trainer.model, self.config.model.path):
                trainer.train(resume_from_checkpoint=resume_from)
        except BaseException:
            # On a full disk it would leave no room to close the record. Any rank may be the one.
            self.checkpoints.drop_staged()
            raise

    def _result(self, metrics: Metrics, of_adapter: dict[str, int]) -> Result:
        run_dir = self.context.run_dir
        checkpoint = self.checkpoints.path(self.last_step)

        def is_unstable(path: Path) -> bool:
            # MARKER has save_steps, a placement, in it; and FILES has MARKER's sha256.
            return path.name == MARKER or path == checkpoint / FILES

        def names(paths: list[Path]) -> list[str]:
            return sorted(path.relative_to(run_dir).as_posix() for path in paths)

        # A folder of data is not there when the data came prepared.
        folders = [run_dir / name for name in (*self.data.folders, INFERENCE_CHECKPOINTS)]
        files = [
            run_dir / STEPS_NAME,
            *(run_dir / name for name in strategy_settings(self.arguments)),
        ]
        files += [path for folder in (*folders, checkpoint) for path in _files(folder)]
        shown = [path for name in ("tensorboard", "wandb") for path in _files(run_dir / name)]
        last = {name: metrics.last[name] for name in ("epoch", "loss") if name in metrics.last}
        evaluated = metrics.last_evaluation.get("eval", {})
        return Result(
            artifacts=artifacts(self.config),
            metrics={
                "num_steps": self.num_steps,
                "num_tokens": metrics.totals.num_tokens,
                "num_trained_tokens": metrics.totals.num_trained_tokens,
                **last,
                **{f"eval_{name}": value for name, value in evaluated.items()},
                "timing": metrics.summary(),
                **of_adapter,
            },
            state_files=names([file for file in files if not is_unstable(file)]),
            # Times and paths.
            unstable_files=[METRICS_NAME, *names([*filter(is_unstable, files), *shown])],
        )


def _resume_step(
    config: TrainingStageConfig, run_dir: Path, checkpoints: Checkpoints
) -> int | None:
    """Errors: UsageError when a checkpoint was written, and none is there."""
    step, num_made = checkpoints.tidy(), num_steps_made(run_dir)
    if step is None and num_made > config.checkpointing.save_steps:
        raise UsageError(
            f"{num_made} steps were made, and there is no checkpoint of any",
            where=str(checkpoints.folder),
            hint=f"bring one back; or remove {run_dir / STEPS_NAME} to begin again",
        )
    return step


def _open_folder(
    config: TrainingStageConfig, run_dir: Path, generated: dict[str, dict[str, Any]]
) -> None:
    """generated: {name of a file: its content}."""
    remove_leftovers(run_dir, "model", ADAPTER, METRICS_NAME, STEPS_NAME, *generated)
    open_inference_checkpoints(run_dir, config.checkpointing.inference_checkpoint_path)
    for name, settings in generated.items():
        write_json(run_dir / name, settings)


def _shown_settings(config: TrainingStageConfig) -> dict[str, Any]:
    """What a reporter shows as the run's settings."""
    roles = settings_by_role(config)
    return {**roles[Role.RECIPE], **roles[Role.TOPOLOGY]}


def _peak(config: TrainingStageConfig, context: StageContext) -> float | None:
    """FLOP/s of all devices together, in the dtype of the matrix products."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.computes_in_16_bits else torch.float32
    one = peak_flops_per_s(device, dtype)
    return None if one is None else one * context.ranks.world_size


def _files(folder: Path) -> list[Path]:
    """Below a folder, which may be a link."""
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
