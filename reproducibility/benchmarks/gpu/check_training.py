"""Step a: what is trained is right, and the same each time.

Packed and padded rows, in float32 and bfloat16, against each sequence alone in float64 on the CPU:
losses and gradients. Then whole runs of `entrypoint sft` in processes of their own, with packing
and mixed precision: twice, and once killed by SIGKILL and started again. Their files are compared.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from made_up import CORPUS, SHAPES, MadeUpRows, random_model
from step import Step, start
from training import Clock, free, train_sft

# Relative, of the loss and of a matrix's gradient (the norm of the difference). bfloat16 keeps 8
# bits: each product is off by 2^-9, and a network adds such errors up.
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 1e-1)}
SAVE_STEPS, KILL_AT, NUM_STEPS = 2, 5, 7


def main() -> None:
    step = start(__doc__)
    from post_training.models.device import be_deterministic

    be_deterministic()  # before a GPU is first used
    _check_losses(step, "tiny", (5, 40, 19))
    _check_whole_runs(step)
    if step.tiny:
        _check_same_weights(step, "tiny", (20, 44))
    else:
        _check_losses(step, "1B", (40, 90, 126))
        _check_same_weights(step, "1B", (200, 824))


def _check_losses(step: Step, shape: str, lengths: tuple[int, ...]) -> None:
    from post_training.models.head import ChunkedHead

    rows = MadeUpRows(1, lengths, SHAPES[shape]["vocab_size"])
    # Every dtype starts from the same numbers, drawn on the device: a CPU takes a minute for 1B.
    model = random_model(SHAPES[shape], step.device, torch.bfloat16)
    exact_loss, exact_gradient = exact_loss_and_gradient(model.cpu().double(), rows)
    for name, (of_loss, of_gradient) in TOLERANCES.items():
        model = random_model(SHAPES[shape], step.device, torch.bfloat16)
        model = model.to(getattr(torch, name))
        head = ChunkedHead.install(model)
        layouts = [(True, "sdpa"), (False, "sdpa")]
        if name == "bfloat16":  # on GPUs varlen computes in nothing else
            layouts.append((True, "varlen"))
        for packed, attention in layouts:
            model.set_attn_implementation(attention)
            loss, gradient = our_loss_and_gradient(model, head, rows, packed=packed)
            loss_error = abs(loss - exact_loss) / exact_loss
            gradient_error = float((gradient - exact_gradient).norm() / exact_gradient.norm())
            step.check(
                f"loss, {shape}, {name}, {'packed' if packed else 'padded'}, {attention}",
                loss_error <= of_loss and gradient_error <= of_gradient,
                loss=loss,
                loss_in_float64=exact_loss,
                loss_error=loss_error,
                loss_tolerance=of_loss,
                gradient_error=gradient_error,
                gradient_tolerance=of_gradient,
            )
        del model
        free()


def exact_loss_and_gradient(model: Any, rows: MadeUpRows) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy over all predicted tokens, each sequence alone, from full logits; and the
    gradient of the first matrix of the first layer. float64, on the CPU."""
    ids = torch.from_numpy(rows.read(0).ids).long()
    loss, number = torch.zeros((), dtype=torch.float64), 0
    for piece in ids.split(list(rows.lengths)):
        logprobs = model(input_ids=piece[None], use_cache=False).logits[0].log_softmax(-1)
        loss = loss - logprobs[:-1].gather(1, piece[1:, None]).sum()
        number += len(piece) - 1
    loss = loss / number
    loss.backward()
    return float(loss.detach()), _watched(model).grad


def our_loss_and_gradient(
    model: Any, head: Any, rows: MadeUpRows, *, packed: bool
) -> tuple[float, torch.Tensor]:
    """The same by the collator, the model's own attention and the chunked head."""
    from post_training.train.config import SftLossConfig
    from post_training.train.sft_loss import SftCollator, coefficients, factors

    loss_config = SftLossConfig(name="sft")
    collated = rows if packed else _Apart(rows)
    collator = SftCollator(collated, loss_config, pad_token_id=0, packed=packed)
    numbers = [{"row": number} for number in range(1 if packed else len(rows.lengths))]
    batch = collator(numbers)["batch"].to(model.device)
    model.zero_grad()
    with head.scoring(batch.targets, coefficients(batch, *factors(batch.sums, loss_config))):
        loss = model(**batch.inputs, use_cache=False).logits[0]
    loss.backward()
    return float(loss.detach()), _watched(model).grad.cpu().double()


class _Apart:
    """The sequences of a packed row as rows of their own."""

    def __init__(self, rows: MadeUpRows):
        self._rows = rows

    def read(self, number: int) -> Any:
        from post_training.data.prepared.dataset import PreparedRow

        row, start = self._rows.read(0), sum(self._rows.lengths[:number])
        span = slice(start, start + self._rows.lengths[number])
        return PreparedRow(row.ids[span], row.kinds[span], None, (self._rows.lengths[number],))


def _watched(model: Any) -> torch.Tensor:
    return model.model.layers[0].self_attn.q_proj.weight


def _check_whole_runs(step: Step) -> None:
    """Files of a run that is not killed, of one like it, and of one that is."""
    from post_training.core.hashing import hash_files

    runs = {name: step.folder / name for name in ("first", "second", "killed")}
    _write_inputs(step)
    ended = {name: _run_in_process(step, runs[name]) for name in ("first", "second")}
    killed = _run_in_process(step, runs["killed"], kill=True)
    ended["killed"] = _run_in_process(step, runs["killed"])
    if killed != -signal.SIGKILL or any(ended.values()):
        step.check("the same run: equal files", False, ended={**ended, "at the kill": killed})
        return
    files = {name: hash_files(folder) for name, folder in runs.items()}
    for found in files.values():
        del found["metrics.jsonl"]  # times
    for other in ("second", "killed"):
        names = files["first"].keys() | files[other].keys()
        differing = sorted(n for n in names if files["first"].get(n) != files[other].get(n))
        what = "run twice" if other == "second" else "killed and started again"
        step.check(
            f"{what}: equal files",
            not differing and bool(names),
            num_files=len(names),
            differing=differing[:5],
        )


def _write_inputs(step: Step) -> None:
    """By `init-model`: a model in float32, and its tokenizer."""
    from post_training.stages.config import InitModelConfig
    from post_training.stages.context import StageContext
    from post_training.stages.init_model import run

    shape = {name: SHAPES["tiny"][name] for name in SHAPES["tiny"] if name in _OF_INIT_MODEL}
    folder = step.folder / "init"
    folder.mkdir()
    run(InitModelConfig(architecture="llama", corpus=[CORPUS], **shape), StageContext(folder))


_OF_INIT_MODEL = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "vocab_size",
)


def _run_in_process(step: Step, run_dir: Path, *, kill: bool = False) -> int:
    """The exit status; what the run says goes to this process's stderr."""
    command = [sys.executable, __file__, "--one-run", run_dir, "--init", step.folder / "init"]
    done = subprocess.run([*command, *(["--kill"] if kill else [])], stdout=sys.stderr)
    return done.returncode


def _one_run() -> None:
    """`entrypoint sft`, from where its run folder and its record are open."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one-run", type=Path)
    parser.add_argument("--init", type=Path)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from post_training.models.quiet import quiet_libraries
    from post_training.stages.context import StageContext
    from post_training.train.config import SftConfig
    from post_training.train.sft import run

    quiet_libraries(options.init.parent / "cache")
    columns = {"prompt": "question", "completion": "answer"}
    config = {
        "run_dir": options.one_run,
        "model": {"path": options.init / "model"},
        "data": {
            "chat_template": "chatml",
            "datasets": [{"path": CORPUS, "columns": columns}],
        },
        "sft": {"max_seq_length": 256, "packing": "bfd"},
        "training": {
            "max_steps": NUM_STEPS,
            "effective_batch_size": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "mixed_precision": "bf16",
        },
        "checkpointing": {"save_steps": SAVE_STEPS},
        "logging": {"logging_steps": 1},
    }
    updates = 0

    def count(*_: Any) -> None:
        nonlocal updates
        updates += 1
        if options.kill and updates == KILL_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)
    resuming = options.one_run.exists()
    options.one_run.mkdir(parents=True, exist_ok=True)
    inputs = {"data.datasets[0].path": "the corpus of the demo"}
    context = StageContext(options.one_run, resuming=resuming, input_fingerprints=inputs)
    run(SftConfig.model_validate(config), context)


def _check_same_weights(step: Step, shape: str, lengths: tuple[int, ...]) -> None:
    """Two runs in memory of a model that is too large to write down here."""

    def digest(name: str) -> tuple[str, dict[int, float]]:
        model = random_model(SHAPES[shape], step.device, torch.bfloat16)
        rows = MadeUpRows(8, lengths, SHAPES[shape]["vocab_size"])
        losses = train_sft(model, rows, step.folder / name, Clock(2))
        return weights_sha256(model), losses

    (first, losses), (second, _) = digest(f"{shape}-1"), digest(f"{shape}-2")
    free()
    what = f"trained twice, {shape}: equal weights"
    step.check(what, first == second, sha256=first, losses=losses)


def weights_sha256(model: Any) -> str:
    from hashlib import sha256

    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


if __name__ == "__main__":
    _one_run() if "--one-run" in sys.argv else main()
