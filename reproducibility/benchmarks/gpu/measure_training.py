"""Step b: SFT steps of a model of 8 billion parameters, beside a plain transformers loop as 1.0.

Rows of 4096 tokens. Full: weights, gradients and AdamW's averages in bfloat16 (64 GB), gradient
checkpointing. The plain loop has one sequence a row, as it can't keep packed ones apart; ours has
four. So its attention works on longer sequences, which MFU counts and tokens/s doesn't.

Then ZeRO-2 of a model of one billion parameters, with weights and AdamW's averages in float32 on
the GPU and on the CPU: of 8 billion they are 96 GB, and take longer to be made than this step has.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from made_up import SHAPES, MadeUpRows, random_model
from step import Step, start, without_liger
from training import LORA, Clock, free, plain_loop, speeds, train_sft

NUM_STEPS = 4
LIGER = "Liger's kernels"


def main() -> None:
    step = start(__doc__)
    from post_training.models.device import be_deterministic

    be_deterministic()
    shape, small = SHAPES[step.pick("8B", "tiny")], SHAPES[step.pick("1B", "tiny")]
    length = step.pick(4096, 256)
    vocabulary = shape["vocab_size"]
    whole = MadeUpRows(64, (length,), vocabulary)
    packed = MadeUpRows(64, (length // 2, length // 4, length // 8, length // 8), vocabulary)
    checkpointing = {"gradient_checkpointing": True}

    def plain(*, liger: bool = False) -> tuple[Any, Clock, MadeUpRows]:
        model, clock = random_model(shape, step.device, torch.bfloat16), Clock(NUM_STEPS)
        if liger:  # its fused output layer and loss too
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.use_deterministic_algorithms(False)  # as it comes: nobody asks for them there
        try:
            plain_loop(model, whole, clock)
        finally:
            torch.use_deterministic_algorithms(True)
        return model, clock, whole

    def ours(rows: MadeUpRows, **settings: Any) -> Callable[[], tuple[Any, Clock, MadeUpRows]]:
        def run() -> tuple[Any, Clock, MadeUpRows]:
            attention = settings.get("attention", "sdpa")
            if is_zero := "distributed" in settings:
                let_deepspeed_compile_nothing()
            model = random_model(
                small if is_zero else shape, step.device, torch.bfloat16, attention
            )
            clock = Clock(NUM_STEPS, calls=2 if is_zero else 1)
            folder = step.folder / str(len(list(step.folder.iterdir())))
            train_sft(model, rows, folder, clock, prompt_loss_weight=1.0, **settings)
            return model, clock, rows

        return run

    def zero(offload: str) -> Callable[[], tuple[Any, Clock, MadeUpRows]]:
        distributed = {"strategy": "zero2", "offload": offload}
        training = {**checkpointing, "mixed_precision": "bf16"}
        return ours(packed, training=training, attention="varlen", distributed=distributed)

    runs = {
        "plain transformers loop, full": plain,
        f"plain transformers loop, full, {LIGER}": partial(plain, liger=True),
        "ours, full, one sequence a row": ours(whole, training=checkpointing),
        "ours, full, packed, sdpa": ours(packed, training=checkpointing),
        "ours, full, packed, varlen": ours(packed, training=checkpointing, attention="varlen"),
        "ours, full, packed, varlen, logits in float32": ours(
            packed, training=checkpointing, attention="varlen", float32_logits=True
        ),
        f"ours, full, packed, varlen, {LIGER}": ours(
            packed, training={**checkpointing, "use_liger_kernel": True}, attention="varlen"
        ),
        "ours, LoRA 16, packed, sdpa": ours(packed, training=checkpointing, lora=LORA),
        "ours, LoRA 16, packed, varlen": ours(
            packed, training=checkpointing, lora=LORA, attention="varlen"
        ),
        # The last: they start a process group.
        "ours, 1B, ZeRO-2, optimizer's state on the GPU": zero("none"),
        "ours, 1B, ZeRO-2, optimizer's state on the CPU": zero("optimizer"),
    }
    bases: dict[str, float] = {}  # tokens/s of the first run of a shape
    for name, run in runs.items():
        if LIGER in name and (reason := _without_liger(step)) is not None:
            step.skip(name, reason)
            continue
        of_shape = "1B" if "1B" in name else "8B"
        figures = step.attempt(name, partial(_measure, run, bases.get(of_shape)))
        if figures is not None:
            bases.setdefault(of_shape, figures["tokens_per_s"])
        free()
    _measure_heads(step, shape, length)


def let_deepspeed_compile_nothing() -> None:
    """When it starts, DeepSpeed tries which of its operators it could compile; and on CPUs it
    compiles one, which sends by shared memory: minutes, and one process has nobody to send to."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def _without_liger(step: Step) -> str | None:
    """Why its kernels can't be used here."""
    if not step.has_gpu:
        return "Liger's kernels are of GPUs"
    return without_liger()


def _measure(run: Callable[[], tuple[Any, Clock, MadeUpRows]], base: float | None) -> dict:
    model, clock, rows = run()
    tokens = sum(rows.lengths)
    figures = speeds(
        model,
        clock,
        tokens=tokens,
        trained=tokens - len(rows.lengths),
        squares=sum(length**2 for length in rows.lengths),
    )
    return {**figures, "times": round(figures["tokens_per_s"] / base, 3) if base else 1.0}


def _measure_heads(step: Step, shape: dict[str, Any], length: int) -> None:
    """The output layer and its loss alone, forward and backward, of one row: in chunks, on full
    logits in float32, and by Liger."""
    from torch.nn.functional import cross_entropy

    from post_training.models.head import ChunkedHead
    from post_training.models.logit_scaling import LogitScaling

    torch.manual_seed(0)
    layer = torch.nn.Linear(shape["hidden_size"], shape["vocab_size"], bias=False)
    layer = layer.to(step.device, torch.bfloat16)
    hidden = torch.randn(1, length, shape["hidden_size"], device=step.device).bfloat16()
    targets = torch.randint(0, shape["vocab_size"], (1, length), device=step.device)
    ones = torch.full((1, length), 1 / length, device=step.device)

    def full() -> torch.Tensor:
        logits = layer(hidden.requires_grad_()).float()
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def chunked(*, float32_logits: bool) -> Callable[[], torch.Tensor]:
        own = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        own.weight = layer.weight
        head = ChunkedHead(own, LogitScaling(), float32_logits=float32_logits)

        def loss() -> torch.Tensor:
            with head.scoring(targets, ones):
                return own(hidden.requires_grad_())[0]

        return loss

    def liger() -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        flat = hidden.requires_grad_().flatten(0, 1)
        return LigerFusedLinearCrossEntropyLoss()(layer.weight, flat, targets.flatten())

    losses = {
        "full logits": full,
        LIGER: liger,
        "in chunks": chunked(float32_logits=False),
        "in chunks, logits in float32": chunked(float32_logits=True),
    }
    for name, loss in losses.items():
        what = f"output layer and loss, {name}"
        if name == LIGER and (reason := _without_liger(step)) is not None:
            step.skip(what, reason)
            continue
        step.attempt(what, partial(_measure_head, loss))
    if not step.has_gpu:
        step.skip("logits as float32", "torch.mm(out_dtype=…) is of GPUs only")
        return
    products = {
        "logits rounded to bfloat16": lambda h, w: torch.mm(h, w.T).float(),
        "logits as float32": lambda h, w: torch.mm(h, w.T, out_dtype=torch.float32),
    }
    for name, product in products.items():
        step.attempt(name, partial(_measure_logits, product, hidden[0].detach(), layer.weight))


def _measure_head(loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    from measure_ceilings import median_s
    from training import reset_peak

    from post_training.train.throughput import peak_memory_bytes

    reset_peak()
    seconds = median_s(lambda: loss().backward())
    return {"s": round(seconds, 5), "peak_gib": round(peak_memory_bytes() / 2**30, 2)}


@torch.no_grad()
def _measure_logits(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
) -> dict[str, float]:
    """Of a chunk of 1024 positions; and how far the logprobs of some of them are from those of the
    same numbers multiplied in float64, in nats, at most and in the mean."""
    from measure_ceilings import median_s

    chunk = hidden_TD[:1024]
    seconds = median_s(lambda: product(chunk, weight_VD))
    few = chunk[:16]
    exact = (few.double() @ weight_VD.double().T).log_softmax(-1)
    apart = (product(few, weight_VD).double().log_softmax(-1) - exact).abs()
    return {"s": round(seconds, 5), "most": float(apart.max()), "mean": float(apart.mean())}


if __name__ == "__main__":
    main()
