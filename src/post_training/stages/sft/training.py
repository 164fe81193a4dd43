"""From prepared rows to a model folder: the model in, the Trainer's settings, the result out."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from post_training.core.errors import PostTrainingError
from post_training.data.prepared.dataset import PreparedDataset, figures
from post_training.models.load import check_vocabulary, load_model
from post_training.models.save import save_model_folder, stop_at
from post_training.stages.context import Result, StageContext
from post_training.stages.progress import Progress
from post_training.stages.sft.collator import Collator
from post_training.stages.sft.config import SftConfig
from post_training.stages.sft.trainer import Trainer, read_totals
from post_training.stages.training.arguments import training_arguments
from post_training.stages.training.checkpoints import Checkpoints
from post_training.stages.training.metrics import Metrics


def train(
    config: SftConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    dataset: PreparedDataset,
    num_accumulated: int,
) -> Result:
    """Train to the end, from the newest checkpoint where there is one."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, at a price
    model = _load(config, tokenizer)
    use_cache = model.config.use_cache
    template = dataset.template
    if template is not None:
        tokenizer.chat_template = template.text
    num_steps = config.training.num_steps(len(dataset))
    checkpoints = Checkpoints(
        context.run_dir / "checkpoints", config.checkpointing.save_total_limit
    )
    resume_step = context.on_writer(checkpoints.tidy)
    metrics_path = context.run_dir / "metrics.jsonl" if context.ranks.is_writer else None
    metrics = Metrics(metrics_path, config.logging.logging_steps)
    metrics.resume(resume_step or 0, read_totals(checkpoints, resume_step))
    if resume_step is not None:
        context.log(f"resuming from step {resume_step} of {num_steps}")

    with Progress("step", num_steps, shown=context.ranks.is_writer) as progress:
        trainer = Trainer(
            model=model,
            args=training_arguments(config, checkpoints.staging, num_steps, num_accumulated),
            tokenizer=tokenizer,
            collator=_collator(config, tokenizer, dataset),
            shuffled=not config.data.debug_oom,
            context=context,
            checkpoints=checkpoints,
            metrics=metrics,
            progress=progress,
        )
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)  # accelerate may have chosen another
        resume_from = None if resume_step is None else str(checkpoints.path(resume_step))
        trainer.train(resume_from_checkpoint=resume_from)

    model.config.use_cache = use_cache  # the Trainer turns it off for training
    if template is not None:
        stop_at(model, tokenizer, template.end_of_turn)
    context.on_writer(lambda: save_model_folder(context.run_dir / "model", model, tokenizer))
    return _result(context, checkpoints.path(num_steps), metrics, dataset, num_steps)


def _collator(
    config: SftConfig, tokenizer: PreTrainedTokenizerBase, dataset: PreparedDataset
) -> Collator:
    if dataset.has_weights:
        raise PostTrainingError(
            "messages have weights other than 0 and 1, which the loss does not know yet",
            where="data",
        )
    # Padding is no part of the attention or of the loss, so any id will do.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Collator(dataset, pad_token_id=pad, packed=config.sft.packing != "none")


def _load(config: SftConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = load_model(
        config.model.path,
        dtype=config.model.dtype,
        attn_implementation=config.model.attn_implementation,
    )
    check_vocabulary(model, tokenizer)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and config.sft.max_seq_length > limit:
        raise PostTrainingError(
            f"must be ≤ {limit}, the positions of the model (got {config.sft.max_seq_length})",
            where="sft.max_seq_length",
        )
    return model


def _result(
    context: StageContext,
    checkpoint: Path,
    metrics: Metrics,
    dataset: PreparedDataset,
    num_steps: int,
) -> Result:
    def relative(path: Path) -> str:
        return path.relative_to(context.run_dir).as_posix()

    def unstable(path: Path) -> bool:
        return path.name == "trainer_state.json"  # it names the placement: save_steps

    data = context.run_dir / "data"  # not there when the data came prepared
    files = [*(data.iterdir() if data.exists() else ()), *checkpoint.iterdir()]
    last = {name: metrics.last[name] for name in ("epoch", "loss") if name in metrics.last}
    return Result(
        artifacts={"model": "model"},
        metrics={
            "num_steps": num_steps,
            **figures(dataset.record),
            "num_tokens": metrics.totals.num_tokens,
            "num_trained_tokens": metrics.totals.num_trained_tokens,
            **last,
        },
        state_files=sorted(relative(file) for file in files if not unstable(file)),
        unstable_files=[
            "metrics.jsonl",  # times
            *sorted(relative(file) for file in files if unstable(file)),
        ],
    )
