"""One training run of a benchmark, in the process that calls it: ours, TRL's, or with full logits.

A `Job` says what is trained; the rows are prepared beforehand, and every side gets the same ones in
the same order. Each side returns `Steps.figures`: what is timed is from the end of one update of
the optimizer to the end of the next, whoever drives it, and the run is over with the last of them
(nothing is saved: a checkpoint of 8 billion parameters has 64 GB).
"""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any

# Kernels are chosen and the optimizer's averages are made in them, so they are in no figure.
WARMUP_STEPS = 3
SEED = 0


@dataclass(frozen=True)
class Job:
    """model: a model folder. rows: a prepared dataset, made with `sequences`. rows_per_step: one
    micro-batch. prompt_loss_weight: TRL knows 0 and 1. training: further settings of ours."""

    model: Path
    rows: Path
    sequences: dict[str, Any]
    rows_per_step: int
    num_steps: int
    prompt_loss_weight: float = 0.0
    dtype: str = "float32"
    attention: str = "sdpa"
    training: dict[str, Any] = field(default_factory=dict)
    logging_steps: int = 10

    @property
    def num_steps_in_all(self) -> int:
        return WARMUP_STEPS + self.num_steps


class Over(Exception):
    """The last step that is looked at is done."""


class Steps:
    """Listens to the optimizer's updates, of whatever optimizer. Memory: of the GPU, where there
    is one, in tensors; else of the process, resident, from the kernel's high-water mark."""

    def __init__(self, job: Job):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self._last = job.num_steps_in_all
        self._ends: list[float] = []
        self._cpu_ends: list[float] = []
        self._before_mib = self._peak_mib = 0.0
        register_optimizer_step_post_hook(self._end)

    def _end(self, *_: Any) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())
        self._cpu_ends.append(time.process_time())
        if len(self._ends) == WARMUP_STEPS:
            self._before_mib = _start_of_peak()
        if len(self._ends) == self._last:
            self._peak_mib = _peak_mib()
            raise Over

    def figures(self) -> dict[str, Any]:
        """step_s, cpu_s: of each step, by the clock and of the process's threads together.
        before_mib: weights, gradients and the optimizer's state."""
        return {
            "step_s": _differences(self._ends[WARMUP_STEPS - 1 :]),
            "cpu_s": _differences(self._cpu_ends[WARMUP_STEPS - 1 :]),
            "before_mib": self._before_mib,
            "peak_mib": self._peak_mib,
        }


def _differences(values: list[float]) -> list[float]:
    return [end - start for start, end in pairwise(values)]


def _start_of_peak() -> float:
    """Forget the peak so far; the memory that is in use."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: sets VmHWM to VmRSS
    return _of_process_mib("VmRSS")


def _peak_mib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return _of_process_mib("VmHWM")


def _of_process_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def ours(job: Job, output: Path) -> dict[str, Any]:
    """`entrypoint sft`, from where its run folder and record are open; and the losses that were
    logged, by step."""
    from post_training.stages.context import StageContext
    from post_training.train.config import SftConfig
    from post_training.train.sft import run

    settings: dict[str, Any] = {
        "run_dir": output,
        "seed": SEED,
        "num_threads": int(os.environ["OMP_NUM_THREADS"]),
        "model": {
            "path": job.model,
            "dtype": job.dtype,
            "attn_implementation": job.attention,
        },
        "data": {"prepared": job.rows},
        "sft": job.sequences,
        "loss": {"name": "plw", "prompt_loss_weight": job.prompt_loss_weight},
        "training": {
            "max_steps": job.num_steps_in_all + 1,
            "effective_batch_size": job.rows_per_step,
            "per_device_train_batch_size": job.rows_per_step,
            "learning_rate": 1e-4,
            **job.training,
        },
        "checkpointing": {"save_steps": 10**9},
        "logging": {"logging_steps": job.logging_steps},
    }
    config = SftConfig.model_validate(settings)
    output.mkdir(parents=True)
    steps = Steps(job)
    with suppress(Over):
        run(config, StageContext(output))
    return {**steps.figures(), "losses": logged_losses(output / "metrics.jsonl")}


def logged_losses(metrics: Path) -> dict[int, float]:
    import json

    if not metrics.exists():
        return {}
    lines = map(json.loads, metrics.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def trl(job: Job, output: Path, **others: Any) -> dict[str, Any]:
    """TRL's SFTTrainer with its defaults, but for what makes it the same run: rows (already ids and
    labels), their order, dtype, schedule and threads. others: further arguments of its."""
    quiet(output)
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from post_training.models.load import load_model, load_tokenizer

    model = load_model(job.model, dtype=job.dtype, attn_implementation=job.attention)
    arguments: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": job.num_steps_in_all + 1,
        "per_device_train_batch_size": job.rows_per_step,
        "learning_rate": 1e-4,
        "seed": SEED,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": job.logging_steps,
        **others,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments),
        train_dataset=Dataset.from_list(list(_trl_rows(job))),
        processing_class=load_tokenizer(job.model),
    )
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps = Steps(job)
    with suppress(Over):
        trainer.train()
    history = trainer.state.log_history
    return {**steps.figures(), "losses": {line["step"]: line["loss"] for line in history}}


def _trl_rows(job: Job) -> Iterator[dict[str, Any]]:
    """In the order in which ours takes them."""
    from post_training.data.prepared.dataset import PreparedDataset
    from post_training.data.rows import COMPLETION, EXCLUDED, PROMPT

    kinds = {0.0: (COMPLETION,), 1.0: (COMPLETION, PROMPT)}[job.prompt_loss_weight]
    assert EXCLUDED not in kinds
    dataset = PreparedDataset.open(job.rows)
    for number in row_numbers(job, len(dataset), job.num_steps_in_all + 1):
        row = dataset.read(number)
        labels = [
            int(token) if kind in kinds else -100
            for token, kind in zip(row.ids, row.kinds, strict=True)
        ]
        yield {
            "input_ids": row.ids.tolist(),
            "labels": labels,
            "seq_lengths": list(row.lengths),
        }


def full_logits(job: Job, output: Path) -> dict[str, Any]:
    """plw as a textbook has it: float32 logits of every position, cross-entropy, weights, AdamW.

    Nothing is kept but what autograd keeps; the batches are those of ours.
    """
    quiet(output)
    import torch
    from torch.nn.functional import cross_entropy

    from post_training.data.prepared.dataset import PreparedDataset
    from post_training.models.load import load_model
    from post_training.train.config import SftLossConfig
    from post_training.train.sft_loss import SftCollator, coefficients, factors

    loss_config = SftLossConfig(name="plw", prompt_loss_weight=job.prompt_loss_weight)
    dataset = PreparedDataset.open(job.rows)
    packed = job.sequences["packing"] != "none"
    collator = SftCollator(dataset, loss_config, pad_token_id=0, packed=packed)
    model = load_model(job.model, dtype=job.dtype, attn_implementation=job.attention).train()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    numbers = row_numbers(job, len(dataset), job.num_steps_in_all)

    def loss_of(batch: Any) -> Any:
        logits_BTV = model(**batch.inputs, use_cache=False).logits.float()
        losses = cross_entropy(logits_BTV.flatten(0, 1), batch.targets.flatten(), reduction="none")
        weights = coefficients(batch, *factors(batch.sums, loss_config))
        return (weights.flatten() * losses).sum()

    losses, steps = {}, Steps(job)
    with suppress(Over):
        for step in range(job.num_steps_in_all):
            rows = [{"row": number} for number in islice(numbers, job.rows_per_step)]
            loss = loss_of(collator(rows)["batch"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            losses[step + 1] = loss.item()
            optimizer.step()
            optimizer.zero_grad()
    return {**steps.figures(), "losses": losses}


def row_numbers(job: Job, num_rows: int, num_steps: int) -> Iterator[int]:
    from post_training.data.order import row_stream

    return islice(row_stream(num_rows, SEED), num_steps * job.rows_per_step)


def steps_per_epoch(job: Job) -> int:
    from post_training.data.prepared.dataset import PreparedDataset

    return ceil(len(PreparedDataset.open(job.rows)) / job.rows_per_step)


@dataclass(frozen=True)
class Counts:
    """Of the steps that are timed. positions: with padding, what the model works on."""

    tokens: int = 0
    positions: int = 0


def count(job: Job) -> Counts:
    from post_training.data.prepared.dataset import PreparedDataset
    from post_training.train.config import SftLossConfig
    from post_training.train.sft_loss import SftCollator

    dataset = PreparedDataset.open(job.rows)
    loss = SftLossConfig(name="plw", prompt_loss_weight=job.prompt_loss_weight)
    collator = SftCollator(
        dataset,
        loss,
        pad_token_id=0,
        packed=job.sequences["packing"] != "none",
        padding_free=job.training.get("padding_free", False),
    )
    numbers = list(row_numbers(job, len(dataset), job.num_steps_in_all))
    tokens = positions = 0
    for start in range(WARMUP_STEPS * job.rows_per_step, len(numbers), job.rows_per_step):
        rows = numbers[start : start + job.rows_per_step]
        batch = collator([{"row": number} for number in rows])["batch"]
        tokens += batch.num_tokens
        positions += batch.targets.numel()
    return Counts(tokens, positions)


def quiet(output: Path) -> None:
    from post_training.models.quiet import quiet_libraries

    quiet_libraries(output / "cache")
