"""GPT-NeoX's YAML (https://github.com/EleutherAI/gpt-neox, configs/), and keys of LUMI's fork."""

from typing import Any

from post_training.importers.deepspeed import use_deepspeed
from post_training.importers.training_arguments import use_batch, use_kept_checkpoints
from post_training.importers.translation import Becomes, Nothing, Ours, Table, Translation

WHOLE = (
    "zero_optimization",
    "fp16",
    "bf16",
    "attention_config",
    "data_types",
    "optimizer",
    "sparsity_config",
    "deepspeed_extra_args",
    "comet_others",
)
_DEFAULTS: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "lr_decay_style": "linear",
    "gradient_clipping": 1.0,
    "warmup": 0.01,
    "weight_decay": 0.1,
    "keep_last_n_checkpoints": None,
    "seed": 1234,
}
_SHAPE = Ours("config.json of the model folder says the architecture")
_TOKENS = Ours(
    "the tokens of the .bin files are trained as they are; the model's folder has the tokenizer"
)
_LOADER = Ours("rows are read from prepared files, in an order that the seed gives")
_ACTIVATIONS = Ours("training.gradient_checkpointing")
_LAUNCH = Ours("`post-training submit` starts the processes")
_TIMERS = Ours("metrics.jsonl has times, tokens/s and FLOPs")
_PARALLEL = Ours("distributed.strategy divides the model: zero1 to zero3, or fsdp2")
_HELD_OUT = Nothing("set evaluation.prepared by --set: rows that `entrypoint prepare` made")
_LABELS = Nothing(
    "which tokens are trained is in PREFIX_kinds_document, which `entrypoint tokenize` writes"
)
_PAIRS = Nothing("`entrypoint dpo` and `reward-model` read rows with a chosen and a rejected text")
_COMET = Nothing("logging.report_to has wandb and tensorboard")
_PROFILE = Nothing("metrics.jsonl has times and memory; there is no profiler")
_GENERATION = Ours("of generation: `entrypoint generate` has its own configuration")
_SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant"}
_PACKING = {"k_bin_packed": "k_bin_packed", "packed": "next_fit", "unpacked": "none"}


def normalise(given: dict[str, Any]) -> dict[str, Any]:
    """Their keys are written with - or _."""
    return {key.replace("-", "_"): value for key, value in given.items()}


def defaults_of(translation: Translation) -> dict[str, Any]:
    return _DEFAULTS


def choose_stage(given: dict[str, Any]) -> str:
    return "sft"


def _data(translation: Translation, key: str, value: Any) -> None:
    paths = [value] if isinstance(value, str) else value
    translation.put(key, "data.indexed", paths)
    translation.notes.append(
        "of files without PREFIX_kinds_document, as those of plain texts are, --set "
        "data.without_kinds=train_all trains all tokens; else such files are refused"
    )


def _weights(translation: Translation, key: str, value: Any) -> None:
    if len(set(value)) == 1:
        translation.tell(key, "all equal: the data is used as it is")
    else:
        translation.refuse(key, "indexed data has no weights: tokenize a mixture (entrypoint mix)")


def _optimizer(translation: Translation, key: str, value: Any) -> None:
    kind = str(value.get("type", "Adam")).lower()
    ours = {"adam": "adamw", "adamw": "adamw", "cpu_adam": "adamw", "lion": "lion", "sgd": "sgd"}
    if kind not in ours:
        translation.refuse(key, f"type {value['type']} has no counterpart: {', '.join(ours)} have")
        return
    translation.put(key, "training.optimizer", ours[kind], "decoupled weight decay")
    parameters = dict(value.get("params") or {})
    if "lr" in parameters:
        translation.put(key, "training.learning_rate", parameters.pop("lr"))
    for name, one in parameters.items():
        translation.put(key, f"training.optimizer_args.{name}", one)


def _schedule(translation: Translation, key: str, value: Any) -> None:
    if value not in _SCHEDULES:
        translation.refuse(key, f"must be one of {', '.join(_SCHEDULES)}")
        return
    minimum = translation.get("min_lr", 0)
    name = _SCHEDULES[value]
    if value == "cosine" and not minimum:
        name = "cosine"
    if value == "constant" and translation.get("warmup", _DEFAULTS["warmup"]):
        name = "constant_with_warmup"
    if value == "linear" and minimum:
        name = "polynomial"
    translation.put(key, "training.lr_scheduler_type", name)
    if minimum and value == "cosine":
        translation.put("min_lr", "training.lr_scheduler_kwargs", {"min_lr": minimum})
    elif minimum and value == "linear":
        translation.put("min_lr", "training.lr_scheduler_kwargs", {"lr_end": minimum, "power": 1.0})


def _minimum(translation: Translation, key: str, value: Any) -> None:
    if translation.given.get("lr_decay_style") == "constant" and value:
        translation.tell(key, "a constant rate has none")


def _decay_steps(translation: Translation, key: str, value: Any) -> None:
    if value in (None, translation.get("train_iters")):
        translation.tell(key, "over the whole run, same here")
    else:
        translation.refuse(
            key, "a schedule goes over the whole run: train_iters says how long; --drop it"
        )


def _precision(translation: Translation, key: str, value: Any) -> None:
    enabled = value.get("enabled", True) if isinstance(value, dict) else value
    kind = value.get("type", key) if isinstance(value, dict) else value
    if not enabled:
        translation.tell(key, "off")
    elif str(kind) in ("bf16", "bfloat16", "True"):
        translation.put(key, "training.mixed_precision", "bf16")
    else:
        translation.refuse(
            key, f"fp16 has no counterpart: --drop {key}, and --set training.mixed_precision=bf16"
        )


def _zero(translation: Translation, key: str, value: Any) -> None:
    if not value.get("stage"):
        translation.tell(key, "stage 0: ddp")
    else:
        use_deepspeed(translation, key, {"zero_optimization": value})


def _model(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "model.path", value, "the folder that `entrypoint convert` made of it")


def _finetune(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.tell(key, "no setting needed: a new run begins at step 0")
    else:
        translation.tell(key, "no setting needed: the same run goes on from its newest checkpoint")


def _packing(translation: Translation, key: str, value: Any) -> None:
    if value in _PACKING:
        translation.put(key, "sft.packing", _PACKING[value])
    else:
        translation.refuse(key, f"must be one of {', '.join(_PACKING)}")


def _wandb(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "logging.report_to", ["wandb"] if value else [])


def _micro_batch(translation: Translation, key: str, value: Any) -> None:
    if (whole := translation.get("train_batch_size")) is not None:
        translation.put(key, "training.per_device_train_batch_size", value)
        translation.put("train_batch_size", "training.effective_batch_size", whole)
    else:
        use_batch(translation, key, "gradient_accumulation_steps")


def _offset(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.put(key, "training.iteration_offset", value)
    else:
        translation.tell(key, "0, same here")


def _length(translation: Translation, key: str, value: Any) -> None:
    """Their number is that of the last step; ours that of the steps to make."""
    offset = translation.get("iteration_offset", 0)
    if value is None:
        translation.tell(key, "not set")
    elif value > offset:
        note = f"{value} less iteration_offset" if offset else ""
        translation.put(key, "training.max_steps", value - offset, note)
    else:
        translation.refuse(
            key, f"must be > iteration_offset, {offset}: it is the last step's number"
        )


def _stage(translation: Translation, key: str, value: Any) -> None:
    if value == "normal":
        translation.tell(key, "the stage: entrypoint sft")
    else:
        translation.refuse(
            key, f"{value} reads files that are none of ours: entrypoint dpo reads rows of pairs"
        )


TABLE: Table = {
    "train_data_paths": _data,
    "data_path": _data,
    "train_data_weights": _weights,
    "valid_data_paths": _HELD_OUT,
    "test_data_paths": _HELD_OUT,
    "valid_data_weights": _HELD_OUT,
    "test_data_weights": _HELD_OUT,
    "split": Ours("all of the data is trained on; evaluation has its own"),
    "data_impl": Ours("files are mapped into memory"),
    "mmap_warmup": _LOADER,
    "num_workers": _LOADER,
    "pack_impl": _packing,
    "finetune": _finetune,
    "load": _model,
    "save": Becomes("run_dir"),
    "iteration": Ours("the newest checkpoint"),
    "iteration_offset": _offset,
    "optimizer": _optimizer,
    "lr_decay_style": _schedule,
    "min_lr": _minimum,
    "lr_decay_iters": _decay_steps,
    "warmup": Becomes("training.warmup"),
    "warmup_iters": Becomes("training.warmup"),
    "decay_lr_to": Nothing("give min_lr, a rate"),
    "override_lr_scheduler": Ours("a run has the schedule of its own settings"),
    "use_checkpoint_lr_scheduler": Ours("a run has the schedule of its own settings"),
    "train_impl": _stage,
    "gradient_clipping": Becomes("training.max_grad_norm"),
    "clip_grad": Becomes("training.max_grad_norm"),
    "weight_decay": Becomes("training.weight_decay"),
    "seed": Becomes("seed"),
    "seq_length": Becomes("sft.max_seq_length"),
    "train_micro_batch_size_per_gpu": _micro_batch,
    "gradient_accumulation_steps": Ours("part of training.effective_batch_size"),
    "train_batch_size": Ours("training.effective_batch_size"),
    "train_iters": _length,
    "zero_optimization": _zero,
    "zero_allow_untested_optimizer": Ours("our settings name the optimizer"),
    "precision": _precision,
    "fp16": _precision,
    "bf16": _precision,
    "data_types": Ours("gradients are summed in float32"),
    "checkpoint_factor": Becomes("checkpointing.save_steps"),
    "checkpoint_scale": Ours("by steps", ("linear",)),
    "save_interval": Becomes("checkpointing.save_steps"),
    "keep_last_n_checkpoints": use_kept_checkpoints,
    "exit_interval": Becomes("training.exit_interval"),
    "log_interval": Becomes("logging.logging_steps"),
    "eval_interval": Ours("evaluation.eval_steps, where there are rows to evaluate on"),
    "eval_iters": Ours("an evaluation reads all of its rows"),
    "checkpoint_activations": Becomes("training.gradient_checkpointing"),
    "use_wandb": _wandb,
    "wandb_project": Becomes("logging.wandb_project"),
    "wandb_group": Becomes("logging.wandb_group"),
    "wandb_team": Becomes("logging.wandb_entity"),
    "wandb_run_name": Becomes("logging.wandb_run_name"),
    "tensorboard_dir": Ours("RUN/tensorboard, with report_to: [tensorboard]"),
    "log_dir": Ours("RUN/slurm"),
    "attention_dropout": Nothing("config.json says it"),
    "hidden_dropout": Nothing("config.json says it"),
    "checkpoint_validation_with_forward_pass": Ours("a checkpoint's files are compared by digest"),
    "extra_save_iters": Nothing("checkpoints are at each multiple of checkpointing.save_steps"),
    "fp32_allreduce": Ours("gradients are summed in float32"),
    "use_bnb_optimizer": Nothing("optimizers have their state in full precision"),
    "deepspeed_extra_args": Nothing("set distributed.deepspeed_config by --set"),
    "global_num_gpus": Ours("--num-processes says it, and the job's nodes"),
    "comment": Ours("of its job: post-training submit"),
    "wandb_host": Ours("the variable WANDB_BASE_URL says it"),
    "dataset_impl": Ours("the stage says what rows are", ("gpt2",)),
    "allow_chopped": Nothing("sft.overlong says what becomes of a longer text"),
    "moe_num_experts": _SHAPE,
    **dict.fromkeys(
        (f"{part}_label_data_paths" for part in ("train", "valid", "test")),
        _LABELS,
    ),
    **dict.fromkeys(
        (
            f"{side}_{part}{kind}_data_paths"
            for side in ("pos", "neg")
            for part in ("train", "valid", "test")
            for kind in ("", "_label")
        ),
        _PAIRS,
    ),
    **dict.fromkeys((f"{part}_reward_data_paths" for part in ("train", "valid", "test")), _PAIRS),
    **dict.fromkeys(("dpo_fp32", "dpo_beta", "kto_fp32", "kto_beta"), _PAIRS),
    **dict.fromkeys(
        (
            *("use_comet", "comet_project", "comet_experiment_name", "comet_tags"),
            *("comet_others", "comet_workspace"),
        ),
        _COMET,
    ),
    **dict.fromkeys(
        (
            *("profile", "profile_step_start", "profile_step_stop", "memory_profiling"),
            "memory_profiling_path",
        ),
        _PROFILE,
    ),
    **dict.fromkeys(
        (
            *("text_gen_type", "maximum_tokens", "prompt_end", "temperature", "top_p", "top_k"),
            *("recompute", "num_samples", "sample_input_file", "sample_output_file"),
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        (
            *("te_columnparallel", "te_rowparallel", "te_layernorm_mlp", "te_mha"),
            *("rope_fusion", "layernorm_fusion", "rmsnorm_fusion", "use_flashattn_swiglu"),
            *("mamba_selective_scan_fusion", "mamba_inner_func_fusion"),
            "mamba_causal_conv_fusion",
        ),
        Ours("how layers are computed is torch's choice, and changes no result"),
    ),
    **dict.fromkeys(
        ("pipe_parallel_size", "model_parallel_size", "sequence_parallel", "is_pipe_parallel"),
        _PARALLEL,
    ),
    **dict.fromkeys(
        ("checkpoint_num_layers", "partition_activations", "synchronize_each_layer"), _ACTIVATIONS
    ),
    **dict.fromkeys(
        ("vocab_file", "merge_file", "tokenizer_type", "make_vocab_size_divisible_by"), _TOKENS
    ),
    **dict.fromkeys(
        ("launcher", "hostfile", "deepspeed_slurm", "distributed_backend", "master_port"), _LAUNCH
    ),
    **dict.fromkeys(("wall_clock_breakdown", "steps_per_print", "log_grad_norm"), _TIMERS),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_kv_heads",
            "max_position_embeddings",
            "norm",
            "rms_norm_epsilon",
            "layernorm_epsilon",
            "pos_emb",
            "rotary_pct",
            "rotary_emb_base",
            "rotary_interleaved",
            "no_weight_tying",
            "gpt_j_residual",
            "gpt_j_tied",
            "output_layer_parallelism",
            "attention_config",
            "activation",
            "mlp_type",
            "use_bias_in_attn_linear",
            "use_bias_in_norms",
            "use_bias_in_mlp",
            "scaled_upper_triang_masked_softmax_fusion",
            "bias_gelu_fusion",
            "bias_dropout_fusion",
            "init_method",
            "output_layer_init_method",
            "init_method_std",
            "attention_softmax_in_fp32",
            "attention_type",
            "mlp_multiple_of",
            "sliding_window_width",
            "sparsity_config",
            "gmlp_attn_dim",
        ),
        _SHAPE,
    ),
}


def finish(translation: Translation) -> None:
    if not translation.has("sft.packing"):
        translation.put("pack_impl", "sft.packing", "next_fit", "a row holds several documents")
    under_zero = str(translation.settings.get("distributed", {}).get("strategy")).startswith("zero")
    if under_zero and translation.settings.get("training", {}).get("mixed_precision") == "bf16":
        translation.put("precision", "model.dtype", "bfloat16", "DeepSpeed keeps float32 copies")
