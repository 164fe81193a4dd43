"""A training run from a loaded model to RUN/model: what is the same for every training stage.

The stage brings the model, the rows and its own Trainer; here are the checkpoints that are gone on
from, the metrics and who else gets them, the signals, and the models that are written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.config.model import Role, settings_by_role
from post_training.core.errors import UsageError
from post_training.core.files import write_json
from post_training.data.prepared.dataset import UsedTemplate
from post_training.models.device import explained_forward
from post_training.models.head import ChunkedHead
from post_training.models.left_out import told
from post_training.models.save import save_model_folder, stop_at
from post_training.records.run_record import METRICS_NAME, STEPS_NAME
from post_training.stages.context import Progress, Result, StageContext, remove_leftovers
from post_training.train.arguments import (
    join_ranks,
    optimizer_class_and_arguments,
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
from post_training.train.config import TrainingStageConfig, accumulation_steps
from post_training.train.metrics import Metrics, StepLog, num_steps_made
from post_training.train.policy import ADAPTER, adapter_figures, artifacts, to_be_trained, trained
from post_training.train.reporters import open_reporters
from post_training.train.throughput import Throughput, model_flops, peak_flops_per_s
from post_training.train.trainer import Trainer, read_totals


@dataclass(frozen=True)
class Rows:
    """What is trained on. counts: num_rows, num_sequences and num_tokens. folders: in RUN, whose
    files are part of the outcome. template: None where the rows were tokens to begin with."""

    counts: Mapping[str, int]
    template: UsedTemplate | None
    shuffled: bool
    folders: tuple[str, ...]


def run_training(
    config: TrainingStageConfig,
    context: StageContext,
    load: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    make_trainer: Callable[..., Trainer],
    *,
    scores_tokens: bool = True,
) -> Result:
    """Train to the end, from the newest checkpoint where there is one.

    load: reads the model. make_trainer: gets the keywords of `Trainer`, but for its collator.
    scores_tokens: whether the loss is of the language model's head, which is then chunked.
    Errors: Interrupted when a signal asked for an end, once the checkpoint is written.
    """
    if rows.template is not None:
        tokenizer.chat_template = rows.template.text
    num_steps = config.training.num_steps(rows.counts)
    num_accumulated = accumulation_steps(config.training, context.ranks.world_size)
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
    context.on_writer(lambda: _open_folder(config, context.run_dir, strategy_settings(arguments)))
    model = load()
    context.on_writer(context.inputs.check)
    if (left_out := told(model, config.model.path)) is not None:
        context.log(f"warning: {left_out}; they are not trained")
    head = ChunkedHead.install(model) if scores_tokens else None
    model = to_be_trained(config, model)
    of_adapter = adapter_figures(config, model, context)
    flops = model_flops(model)

    def save(path: Path, weights: dict[str, Tensor] | None) -> None:
        is_final = path.parent == context.run_dir
        adapter = path.with_name(ADAPTER if is_final else f"{path.name}-{ADAPTER}")
        result = trained(config, model, adapter, weights)
        if rows.template is not None:
            stop_at(result, tokenizer, rows.template.end_of_turn)
        gathered = None if config.lora else weights
        base = config.model.path if scores_tokens else None  # a reward model's is of another class
        warning = save_model_folder(path, result, tokenizer, gathered, base=base)
        if warning is not None:
            context.log(f"warning: {warning}")

    stop = StopRequest(tells=context.ranks.is_writer)
    with (
        open_reporters(config.logging, context, _shown_settings(config)) as reporters,
        Progress("step", num_steps, shown=context.ranks.is_writer) as progress,
        stop.listening(),
    ):
        metrics = Metrics(
            context.run_dir / METRICS_NAME if context.ranks.is_writer else None,
            config.logging.logging_steps,
            Throughput(flops, _peak(config, context)),
            reporters,
        )
        metrics.resume(resume_step or 0, read_totals(checkpoints, resume_step))
        step_log = StepLog(context.run_dir if context.ranks.is_writer else None)
        step_log.resume(resume_step or 0)
        if resume_step is not None:
            context.log(f"resuming from step {resume_step} of {num_steps}")
        trainer = make_trainer(
            model=model,
            head=head,
            args=arguments,
            optimizer=optimizer_class_and_arguments(config.training, num_steps),
            tokenizer=tokenizer,
            num_rows=rows.counts["num_rows"],
            shuffled=rows.shuffled,
            context=context,
            checkpoints=checkpoints,
            division=division,
            metrics=metrics,
            step_log=step_log,
            progress=progress,
            stop=stop,
            save_model=save,
            inference_steps=config.checkpointing.inference_checkpoint_steps,
            inference_folder=context.run_dir / INFERENCE_CHECKPOINTS,
        )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)  # accelerate may have chosen another
        resume_from = None if resume_step is None else str(checkpoints.path(resume_step))
        try:
            with explained_forward(model, config.model.path):
                trainer.train(resume_from_checkpoint=resume_from)
        except BaseException:
            # On a full disk it would leave no room to close the record. Any rank may be the one.
            checkpoints.drop_staged()
            raise
        made = trainer.state.global_step
        if made < num_steps:
            context.log(f"step {made} of {num_steps} is saved; the same command goes on from there")
            raise stop.end(made, num_steps)
        trainer.save_model_to(context.run_dir / "model")
    generated = [context.run_dir / name for name in strategy_settings(arguments)]
    checkpoint = checkpoints.path(num_steps)
    result = _result(config, context, checkpoint, generated, metrics, rows, num_steps)
    return replace(result, metrics={**result.metrics, **of_adapter})


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
    remove_leftovers(run_dir, "model", ADAPTER, METRICS_NAME, STEPS_NAME, *generated)
    open_inference_checkpoints(run_dir, config.checkpointing.inference_checkpoint_path)
    for name, settings in generated.items():
        write_json(run_dir / name, settings)


def _shown_settings(config: TrainingStageConfig) -> dict[str, Any]:
    roles = settings_by_role(config)
    return {**roles[Role.RECIPE], **roles[Role.TOPOLOGY]}


def _peak(config: TrainingStageConfig, context: StageContext) -> float | None:
    """FLOP/s of all devices together, in the dtype of the matrix products."""
    in_16_bits = config.model.dtype == "bfloat16" or config.training.mixed_precision == "bf16"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = peak_flops_per_s(device, torch.bfloat16 if in_16_bits else torch.float32)
    return None if one is None else one * context.ranks.world_size


def _result(
    config: TrainingStageConfig,
    context: StageContext,
    checkpoint: Path,
    generated: list[Path],
    metrics: Metrics,
    rows: Rows,
    num_steps: int,
) -> Result:
    def unstable(path: Path) -> bool:
        # MARKER has save_steps, a placement, in it; and FILES has MARKER's sha256.
        return path.name == MARKER or path == checkpoint / FILES

    # A folder of data is not there when the data came prepared.
    folders = [context.run_dir / name for name in (*rows.folders, INFERENCE_CHECKPOINTS)]
    files = [context.run_dir / STEPS_NAME, *generated]
    files += [path for folder in (*folders, checkpoint) for path in _files(folder)]
    shown = [path for name in ("tensorboard", "wandb") for path in _files(context.run_dir / name)]
    last = {name: metrics.last[name] for name in ("epoch", "loss") if name in metrics.last}
    evaluated = metrics.last_evaluation.get("eval", {})

    def names(paths: list[Path]) -> list[str]:
        return sorted(path.relative_to(context.run_dir).as_posix() for path in paths)

    return Result(
        artifacts=artifacts(config),
        metrics={
            "num_steps": num_steps,
            "num_tokens": metrics.totals.num_tokens,
            "num_trained_tokens": metrics.totals.num_trained_tokens,
            **last,
            **{f"eval_{name}": value for name, value in evaluated.items()},
            "timing": metrics.summary(),
        },
        state_files=names([file for file in files if not unstable(file)]),
        # Times and paths.
        unstable_files=[METRICS_NAME, *names([*filter(unstable, files), *shown])],
    )


def _files(folder: Path) -> list[Path]:
    """Below a folder, which may be a link."""
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
