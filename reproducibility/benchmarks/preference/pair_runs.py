"""One preference run of a benchmark, in the process that calls it: ours, or TRL's DPOTrainer.

The pairs are prepared once, with the reference's logprobs beside them, and both sides get the same
ids in the same order. Timed and measured as in ../sft/training_runs.py.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from training_runs import SEED, WARMUP_STEPS, Over, Steps, logged_losses, quiet

BETA = 0.1


@dataclass(frozen=True)
class Job:
    """model: a model folder. rows: preference rows, reference.json beside them. limits: of dpo."""

    model: Path
    rows: Path
    pairs_per_step: int
    num_steps: int
    limits: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    training: dict[str, Any] = field(default_factory=dict)
    logging_steps: int = 10

    @property
    def num_steps_in_all(self) -> int:
        return WARMUP_STEPS + self.num_steps

    def settings(self, output: Path) -> dict[str, Any]:
        return {
            "run_dir": output,
            "seed": SEED,
            "num_threads": int(os.environ["OMP_NUM_THREADS"]),
            "model": {"path": self.model, "dtype": self.dtype},
            "data": {"chat_template": "chatml", "datasets": [{"path": self.rows}]},
            "dpo": self.limits,
            "loss": {"name": "dpo", "beta": BETA},
            "training": {
                "max_steps": self.num_steps_in_all + 1,
                "effective_batch_size": self.pairs_per_step,
                "per_device_train_batch_size": self.pairs_per_step,
                "learning_rate": 1e-4,
                **self.training,
            },
            "checkpointing": {"save_steps": 10**9},
            "logging": {"logging_steps": self.logging_steps},
        }


def write_pairs(
    folder: Path, corpus: Path, model: Path, num_shots: int, dtype: str, number: int
) -> Path:
    """Questions, after `num_shots` others with their answers; their answers, and those to other
    questions. With the model's logprobs, by a run of one step that computes them."""
    import numpy as np

    from post_training.data.sources.open import read_objects

    solved = list(islice(read_objects(corpus), number * (num_shots + 1)))
    rows = []
    for start in range(0, len(solved) - num_shots, num_shots + 1):
        *shots, asked = solved[start : start + num_shots + 1]
        text = "".join(f"{shot['question']}\n{shot['answer']}\n\n" for shot in shots)
        rejected = solved[(start + 3) % len(solved)]["answer"]
        prompt = text + asked["question"]
        rows.append({"prompt": prompt, "chosen": asked["answer"], "rejected": rejected})
    folder.mkdir(parents=True)
    file = folder / "pairs.jsonl"
    _write(file, rows)
    job = Job(model, file, 1, -WARMUP_STEPS, dtype=dtype)
    run = _run(job, folder / "run")
    values = np.load(run / "reference/logprobs.npy").tolist()
    for row, (chosen, rejected) in zip(rows, values, strict=True):
        row |= {"ref_chosen_logprob": chosen, "ref_rejected_logprob": rejected}
    _write(file, rows)
    (folder / "reference.json").write_bytes((run / "reference/reference.json").read_bytes())
    return file


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _run(job: Job, output: Path) -> Path:
    from post_training.stages.context import StageContext
    from post_training.train.config import DpoConfig
    from post_training.train.dpo import run

    output.mkdir(parents=True)
    run(DpoConfig.model_validate(job.settings(output)), StageContext(output))
    return output


def ours(job: Job, output: Path) -> dict[str, Any]:
    """`entrypoint dpo` on stored logprobs."""
    steps = Steps(job)
    with suppress(Over):
        _run(job, output)
    return {**steps.figures(), "losses": logged_losses(output / "metrics.jsonl")}


def trl(job: Job, output: Path, **others: Any) -> dict[str, Any]:
    """TRL's DPOTrainer with its defaults, but for what makes it the same run. It can't be given the
    reference's logprobs (python: ValueError, or ignored), and keeps a reference model."""
    quiet(output)
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from post_training.models.load import load_model, load_tokenizer

    model, reference = (
        load_model(job.model, dtype=job.dtype, attn_implementation="sdpa") for _ in range(2)
    )
    arguments: dict[str, Any] = {
        "output_dir": str(output),
        "beta": BETA,
        "max_length": None,
        "max_steps": job.num_steps_in_all + 1,
        "per_device_train_batch_size": job.pairs_per_step,
        "learning_rate": 1e-4,
        "seed": SEED,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": job.logging_steps,
        **others,
    }
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list([{"prompt": "?", "chosen": "a", "rejected": "b"}]),
        processing_class=load_tokenizer(job.model),
    )
    trainer.train_dataset = Dataset.from_list(list(_trl_rows(job, output)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps = Steps(job)
    with suppress(Over):
        trainer.train()
    history = trainer.state.log_history
    return {**steps.figures(), "losses": {line["step"]: line["loss"] for line in history}}


def _trl_rows(job: Job, output: Path) -> Iterator[dict[str, list[int]]]:
    """In the order in which ours takes them."""
    from post_training.data.order import row_stream
    from post_training.data.rows import COMPLETION

    dataset = prepared(job, output)
    number = (job.num_steps_in_all + 1) * job.pairs_per_step
    for row in islice(row_stream(len(dataset), SEED), number):
        [pair] = dataset.read(row)
        # TRL trains all that comes after the prompt: also what a template writes behind an answer.
        ids = {
            name: each.ids[each.kinds == COMPLETION].tolist()
            for name, each in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected))
        }
        yield {"prompt_ids": pair.prefix.tolist(), **ids}


def prepared(job: Job, output: Path) -> Any:
    from post_training.data.chat.templates import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.context import StageContext
    from post_training.stages.prepared_data import PairPreparation
    from post_training.train.config import DpoConfig

    output.mkdir(parents=True, exist_ok=True)
    config = DpoConfig.model_validate(job.settings(output))
    tokenizer = with_special_tokens(load_tokenizer(job.model), config.data.special_tokens)
    return PairPreparation(
        StageContext(output), config.data, config.dpo, tokenizer, config.seed
    ).open_or_prepare()
