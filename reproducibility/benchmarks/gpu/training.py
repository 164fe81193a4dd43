"""Timed steps of our Trainer on a model that is in memory already, and of a plain loop beside it.

What is timed is from the end of one update of the optimizer to the end of the next. The run is over
with the last of them: no checkpoint and no model is written.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from made_up import MadeUpPairs, MadeUpRows, tokenizer

# Kernels are chosen and the optimizer's averages are made in them.
WARMUP_STEPS = 2
LEARNING_RATE = 1e-5
LORA = {"rank": 16, "alpha": 32.0}


class Over(Exception):
    """The last step that is looked at is done."""


@dataclass
class Clock:
    """Ends of the optimizer's updates; raises Over after `num_steps` and those to warm up.

    calls: of the optimizer in an update. ZeRO calls it once for each group of parameters: those
    that decay, and the others.
    """

    num_steps: int
    calls: int = 1
    ends: list[float] = field(default_factory=list)
    at_end: Callable[[int], None] | None = None
    _num_calls: int = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        handle = register_optimizer_step_post_hook(self._end)
        reset_peak()
        try:
            yield
        except Over:
            pass
        finally:
            handle.remove()

    def _end(self, *_: Any) -> None:
        self._num_calls += 1
        if self._num_calls % self.calls:
            return
        synchronize()
        self.ends.append(time.perf_counter())
        if self.at_end is not None:
            self.at_end(len(self.ends))
        if len(self.ends) == WARMUP_STEPS + self.num_steps:
            raise Over

    @property
    def step_s(self) -> float:
        """The median of the timed steps."""
        timed = self.ends[WARMUP_STEPS - 1 :]
        return median(b - a for a, b in pairwise(timed))


def settings(rows: str, attention: str, **changed: Any) -> dict[str, Any]:
    """A configuration of `sft` or `dpo` for rows that are in memory: its paths are never read.
    changed: of the block `training`."""
    return {
        "run_dir": rows,
        "seed": 0,
        "model": {"path": rows, "dtype": "bfloat16", "attn_implementation": attention},
        "data": {"prepared": rows},
        "training": {
            "max_steps": 10**6,
            "effective_batch_size": 1,
            "per_device_train_batch_size": 1,
            "learning_rate": LEARNING_RATE,
            "shuffle": False,
            **changed,
        },
        "checkpointing": {"save_steps": 10**9},
        "logging": {"logging_steps": 10**9},
    }


def train_sft(
    model: Any,
    rows: MadeUpRows,
    folder: Path,
    clock: Clock,
    *,
    attention: str = "sdpa",
    dtype: str = "bfloat16",
    training: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    distributed: dict[str, Any] | None = None,
    prompt_loss_weight: float = 0.1,
    float32_logits: bool = False,
) -> dict[int, float]:
    """`entrypoint sft` from where its data and model are read; the losses, by step."""
    from post_training.models.head import ChunkedHead
    from post_training.train.config import SftConfig
    from post_training.train.sft import SftLoss
    from post_training.train.sft_loss import SftCollator

    config = settings(str(folder), attention, **(training or {}))
    config["model"] |= {"dtype": dtype, "float32_logits": float32_logits}
    config |= {
        "sft": {"max_seq_length": sum(rows.lengths), "packing": "bfd"},
        "loss": {"name": "plw", "prompt_loss_weight": prompt_loss_weight},
        "logging": {"logging_steps": 1},
    }
    config |= {} if lora is None else {"lora": lora}
    config |= {} if distributed is None else {"distributed": distributed}
    checked = SftConfig.model_validate(config)
    head = ChunkedHead.install(model, float32_logits=float32_logits)
    collator = SftCollator(rows, checked.loss, pad_token_id=0, packed=True)
    _run(checked, model, collator, rows.counts, SftLoss(checked.loss, head, None), folder, clock)
    return _losses(folder)


def train_dpo(
    model: Any, pairs: MadeUpPairs, folder: Path, clock: Clock, *, share_prompt: bool, **training
) -> None:
    """`entrypoint dpo` with LoRA, from where its data, the reference's logprobs and the model are
    read."""
    import numpy as np

    from post_training.models.head import ChunkedHead
    from post_training.train.config import DpoConfig
    from post_training.train.dpo import DpoLoss
    from post_training.train.dpo_loss import PairCollator

    config = settings(str(folder), "sdpa", **training)
    # Packed: a row without padding, as with a shared prompt, so that both do the same work.
    config |= {
        "dpo": {
            "share_prompt": share_prompt,
            "packing": "bfd",
            "max_seq_length": 2 * (pairs.prompt + pairs.completion),
        },
        "loss": {"name": "dpo", "beta": 0.1},
        "lora": LORA,
    }
    checked = DpoConfig.model_validate(config)
    collator = PairCollator(
        pairs,
        np.zeros((pairs.num_rows, 2)),
        pad_token_id=0,
        packed=True,
        padding_free=False,
        share_prompt=share_prompt,
        additive_mask=False,
    )
    # Random weights have no reference: nothing is compared with one (tolerance None).
    loss = DpoLoss(
        checked.loss, ["made up"], ChunkedHead.install(model), None,
        tolerance=None, closed_form_tolerance=1.0,
    )  # fmt: skip
    _run(checked, model, collator, pairs.counts, loss, folder, clock)


def _run(
    config: Any, model: Any, collator: Any, counts: Any, loss: Any, folder: Path, clock: Clock
) -> None:
    from post_training.stages.context import StageContext
    from post_training.train.session import Session
    from post_training.train.trainer import TrainingData

    folder.mkdir(parents=True, exist_ok=True)
    data = TrainingData(collator, counts, shuffled=False, template=None, folders=())
    session = Session.open(config, StageContext(folder), tokenizer(), data)
    with clock.listening():
        session.train(model.train(), loss)


def _losses(folder: Path) -> dict[int, float]:
    import json

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def plain_loop(model: Any, rows: MadeUpRows, clock: Clock, *, fused: bool = True) -> None:
    """What a user writes without us: transformers' own loss on full logits, AdamW, clipping; each
    row is one sequence. The model has gradient checkpointing switched on where it is wanted."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=LEARNING_RATE, fused=fused)
    with clock.listening():
        for step in range(10**6):
            ids = torch.from_numpy(rows.read(step % rows.num_rows).ids).long()[None].to(device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def speeds(model: Any, clock: Clock, *, tokens: int, trained: int, squares: int) -> dict[str, Any]:
    """tokens/s, MFU as our runs record it (None where the device's peak isn't known), and memory.

    tokens, trained, squares: of a step, those a loss is taken of, and the squared lengths summed.
    """
    from post_training.train.throughput import model_flops, peak_flops_per_s, peak_memory_bytes

    parameter = next(model.parameters())
    flops, peak = model_flops(model), peak_flops_per_s(parameter.device, parameter.dtype)
    mfu = None
    if flops is not None and peak is not None:
        mfu = round(flops.of_step(tokens, trained, squares) / clock.step_s / peak, 4)
    return {
        "step_s": round(clock.step_s, 4),
        "tokens_per_s": round(tokens / clock.step_s, 1),
        "mfu": mfu,
        "peak_gib": round(peak_memory_bytes() / 2**30, 2),
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def free() -> None:
    """After the last reference to a model: a Trainer is in cycles, which only the collector
    finds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
