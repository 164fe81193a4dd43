"""Tiny models of megatron-core itself, on CPUs: built, run and saved by its own code, in as many
processes as ranks are asked for (helpers.gloo_ranks).

megatron-core asks CUDA for a device in places where a CPU would do; those questions are answered
here. Nothing of what it computes or saves is replaced.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from helpers.tiny_models import spread_out
from post_training.stages.context import StageContext

VOCABULARY, PADDED = 328, 384
IDS = torch.arange(3, 43)[None]
_SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
}
_ARGUMENTS = {
    **_SHAPE,
    "group_query_attention": True,
    "max_position_embeddings": 128,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "add_bias_linear": False,
    "padded_vocab_size": PADDED,
    "make_vocab_size_divisible_by": 128,
    "bf16": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"swiglu": True, "untie_embeddings_and_output_weights": True},
    "tied": {"swiglu": True, "untie_embeddings_and_output_weights": False},
    "interleaved": {
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "rotary_interleaved": True,
    },
    "ungrouped": {  # 1 is Megatron's default, and says nothing
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "group_query_attention": False,
        "num_query_groups": 1,
    },
    "apertus": {
        "xielu": True,
        "qk_layernorm": True,
        "untie_embeddings_and_output_weights": True,
    },
    "mixtral": {
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "num_experts": 4,
        "moe_router_topk": 2,
    },
}


class XIELU(torch.nn.Module):
    """xIELU (arXiv 2411.13010), with its two numbers as Apertus' training keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = torch.nn.Parameter(torch.rand(1))
        self.alpha_n = torch.nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        alpha_p = functional.softplus(self.alpha_p)
        alpha_n = 0.5 + functional.softplus(self.alpha_n)
        negative = alpha_n * (torch.expm1(torch.clamp(x, max=-1e-6)) - x)
        return torch.where(x > 0, alpha_p * x * x, negative) + 0.5 * x

    def sharded_state_dict(self, prefix: str, offsets: Any, _: Any) -> dict[str, Any]:
        """As every module of Megatron's has it."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, offsets)


def _prepare(tensor: int, pipeline: int, expert: int) -> None:
    import megatron.core.tensor_parallel.random as random_state
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    random_state.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    moe_utils.te_general_gemm = None  # not defined where Transformer Engine isn't installed
    parallel_state.initialize_model_parallel(
        tensor, pipeline, expert_model_parallel_size=expert, expert_tensor_parallel_size=tensor
    )


def build(family: str, *, tensor: int = 1, pipeline: int = 1, expert: int = 1) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = FAMILIES[family]
    experts = settings.get("num_experts")
    routing: dict[str, Any] = {"num_moe_experts": experts, "moe_token_dispatcher_type": "allgather"}
    if experts:
        routing |= {"moe_router_topk": settings["moe_router_topk"], "moe_ffn_hidden_size": 48}
    groups = _SHAPE["num_query_groups"] if settings.get("group_query_attention", True) else None
    config = TransformerConfig(
        **{**_SHAPE, "num_query_groups": groups},
        **routing,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=tensor,
        gated_linear_unit=settings.get("swiglu", False),
        activation_func=functional.silu,
        normalization="RMSNorm",
        qk_layernorm=settings.get("qk_layernorm", False),
        rotary_interleaved=settings.get("rotary_interleaved", False),
        add_bias_linear=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    torch.manual_seed(0)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm,
            normalization="RMSNorm",
        ),
        vocab_size=PADDED,
        max_sequence_length=128,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not settings["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        parallel_output=False,
    )  # fmt: skip
    if settings.get("xielu"):
        for layer in model.decoder.layers:
            layer.mlp.activation_func = XIELU()
    spread_out(model, seed=parallel_state.get_pipeline_model_parallel_rank())
    return model.eval()


def logits(model: Any) -> list[list[float]]:
    """[tokens, vocabulary] of IDS, by megatron-core. Numbers: a tensor that is sent to another
    process needs this one to live on."""
    length = IDS.shape[1]
    future = torch.triu(torch.ones(length, length), 1).bool()[None, None]
    with torch.no_grad():
        return model(IDS, torch.arange(length)[None], future)[0, :, :VOCABULARY].tolist()


def _state(model: Any, family: str, **ranks: int) -> dict[str, Any]:
    arguments = {
        **_ARGUMENTS,
        **FAMILIES[family],
        "tensor_model_parallel_size": ranks.get("tensor", 1),
        "pipeline_model_parallel_size": ranks.get("pipeline", 1),
        "expert_model_parallel_size": ranks.get("expert", 1),
    }
    return {
        "args": argparse.Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "model": model,
    }


def save_families(context: StageContext) -> dict[str, Any]:
    """Save each family in both formats below the folder; its logits, by megatron-core."""
    from megatron.core import dist_checkpointing

    _prepare(1, 1, 1)
    found = {}
    for family in FAMILIES:
        model = build(family)
        found[family] = logits(model)
        for kind in ("torch_dist", "torch"):
            root = context.run_dir / f"{family}-{kind}"
            folder = root / "iter_0000010"
            folder.mkdir(parents=True)
            (root / "latest_checkpointed_iteration.txt").write_text("10")
            if kind == "torch_dist":
                state = _state(model.sharded_state_dict(), family)
                dist_checkpointing.save(state, str(folder))
            else:
                (folder / "mp_rank_00").mkdir()
                state = _state(model.state_dict(), family)
                torch.save(state, folder / "mp_rank_00/model_optim_rng.pt")
    return found


def load_families(context: StageContext) -> dict[str, Any]:
    """The logits of what post-training wrote for Megatron: FAMILY-torch_dist and FAMILY-torch."""
    from megatron.core import dist_checkpointing

    _prepare(1, 1, 1)
    found = {}
    for root in sorted(context.run_dir.glob("*-torch*")):
        family, _, kind = root.name.rpartition("-")
        model = build(family)
        folder = root / (root / "latest_checkpointed_iteration.txt").read_text()
        if kind == "torch_dist":
            state = {"model": model.sharded_state_dict()}
            model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
        else:
            path: Path = folder / "mp_rank_00/model_optim_rng.pt"
            model.load_state_dict(torch.load(path, weights_only=False)["model"])
        found[root.name] = logits(model)
    return found


def save_on_ranks(context: StageContext) -> list[list[float]]:
    """On 4 ranks: Mixtral with 2 tensor-parallel × 2 expert-parallel, in both formats; its
    logits."""
    from megatron.core import dist_checkpointing, parallel_state

    from post_training.models.conversion.megatron import rank_folder

    _prepare(2, 1, 2)
    ranks = {"tensor": 2, "expert": 2}
    model = build("mixtral", **ranks)
    found = logits(model)
    dist_folder = context.run_dir / "torch_dist"
    if context.ranks.is_writer:
        dist_folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(
        _state(model.sharded_state_dict(), "mixtral", **ranks), str(dist_folder)
    )
    tensor = parallel_state.get_tensor_model_parallel_rank()
    expert = parallel_state.get_expert_model_parallel_rank()
    folder = context.run_dir / "torch" / rank_folder(1, 2, tensor, 0, expert)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(_state(model.state_dict(), "mixtral", **ranks), folder / "model_optim_rng.pt")
    return found
