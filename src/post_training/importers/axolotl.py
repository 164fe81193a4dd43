"""Axolotl's YAML (https://docs.axolotl.ai/docs/config-reference.html)."""

from typing import Any

from post_training.importers.axolotl_rows import use_datasets, use_template
from post_training.importers.fsdp import use_fsdp_config
from post_training.importers.training_arguments import (
    ATTENTION,
    BY_LENGTH,
    PACKING,
    QUANTIZED,
    REMOTE_CODE,
    TRAINING_ARGUMENTS,
    UNUSED_PARAMETERS,
    use_epochs,
    use_length,
    use_micro_batch,
    use_model,
    use_optimizer,
    use_revision,
)
from post_training.importers.translation import (
    Becomes,
    Nothing,
    Ours,
    Table,
    Translation,
    becomes_if_set,
)

WHOLE = (
    "gradient_checkpointing_kwargs",
    "optim_args",
    "lr_scheduler_kwargs",
    "deepspeed",
    "fsdp_config",
    "flex_attn_compile_kwargs",
)
# What Axolotl does where its file says nothing, and we would do otherwise.
_DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "chat_template": "tokenizer_default",
    "bf16": "auto",
    "seed": 42,
}
_DEFAULTS_OF_SFT = {"sequence_len": 512, "excess_length_strategy": "drop"}
_DEFAULTS_OF_DPO = {"rl_beta": 0.1}
_LOSSES = {"dpo": "dpo", "ipo": "ipo"}
_OTHER_NAMES = {"flash_attn2": "fa2", "flash_attn3": "fa3", "vllm_flash_attn3": "fa3"}
_OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "fail", None: "drop"}
_WATCHDOG = Ours("a loss that is not finite ends the run, and a high one does not")
_WITHOUT_USE = Ours("nothing reads it any more")
_WANDB = Nothing("models and gradients are not sent to W&B; RUN/model has the one")
_PLUGINS = {
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": "full logits never exist here",
    "axolotl.integrations.liger.LigerPlugin": "training.use_liger_kernel says it",
    "axolotl.integrations.kernels.KernelsPlugin": "kernels change no result",
}


def _plugins(translation: Translation, key: str, value: Any) -> None:
    for name in value or []:
        if name in _PLUGINS:
            translation.tell(key, f"{name}: no setting needed: {_PLUGINS[name]}")
        else:
            translation.refuse(key, f"no counterpart of {name}; --drop {key} leaves it out")


def _schedule(translation: Translation, key: str, value: Any) -> None:
    if value == "cosine" and translation.get("cosine_min_lr_ratio"):
        ratio = translation.get("cosine_min_lr_ratio")
        translation.put(key, "training.lr_scheduler_type", "cosine_with_min_lr")
        translation.put(
            "cosine_min_lr_ratio", "training.lr_scheduler_kwargs", {"min_lr_rate": ratio}
        )
    else:
        translation.put(key, "training.lr_scheduler_type", value)


def _minimum(translation: Translation, key: str, value: Any) -> None:
    if translation.get("lr_scheduler", _DEFAULTS["lr_scheduler"]) != "cosine" and value:
        translation.refuse(key, "belongs to lr_scheduler: cosine")


def _padding(translation: Translation, key: str, value: Any) -> None:
    if value and translation.stage == "dpo":
        translation.tell(key, "of sft: the pairs of a micro-batch are padded to the longest")
    elif value:
        length = translation.get("sequence_len", _DEFAULTS_OF_SFT["sequence_len"])
        translation.put(key, "training.pad_to_multiple_of", length, "of sequence_len")
    else:
        translation.tell(key, "off, same here")


def _attention(translation: Translation, key: str, value: Any) -> None:
    if not value:
        translation.tell(key, "off, same here")
    else:
        name = ATTENTION[key.removesuffix("_attention")] if key in ("sdp_attention",) else "varlen"
        translation.put(key, "model.attn_implementation", name, "PyTorch's FlashAttention")


def _attention_name(translation: Translation, key: str, value: Any) -> None:
    name = str(value).removeprefix("kernels-community/").replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name not in ATTENTION:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")
    else:
        translation.put(key, "model.attn_implementation", ATTENTION[name])


def _inputs(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.put(key, "loss", {"name": "sft"}, "all tokens")
    else:
        translation.tell(key, "no setting needed: the assistant's turns")


def _held_out(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.refuse(
            key,
            "`entrypoint split` makes the rows to evaluate on, once, so that every run has the "
            f"same: name them by --set 'evaluation.datasets=[{{path: …}}]', and --drop {key}",
        )
    else:
        translation.tell(key, "none, same here")


def _shuffled(translation: Translation, key: str, value: Any) -> None:
    if value is False:
        translation.put(key, "training.shuffle", False)
    else:
        translation.tell(key, "no setting needed: each epoch has an order of its own")


def _adapter(translation: Translation, key: str, value: Any) -> None:
    if value == "lora":
        translation.settings.setdefault("lora", {})
        translation.tell(key, "lora")
    elif value:
        translation.refuse(key, f"no counterpart of {value}: lora is")
    else:
        translation.tell(key, "none, same here")


def _wandb_project(translation: Translation, key: str, value: Any) -> None:
    if value:
        _report_to(translation, "wandb")
        translation.put(key, "logging.wandb_project", value, "and report_to has wandb")
    else:
        translation.tell(key, "not set")


def _use_wandb(translation: Translation, key: str, value: Any) -> None:
    if value:
        _report_to(translation, "wandb")
    translation.tell(key, "logging.report_to has wandb" if value else "off, same here")


def _tensorboard(translation: Translation, key: str, value: Any) -> None:
    if value:
        _report_to(translation, "tensorboard")
        translation.tell(key, "logging.report_to has tensorboard")
    else:
        translation.tell(key, "off, same here")


def _report_to(translation: Translation, name: str) -> None:
    names = translation.settings.setdefault("logging", {}).setdefault("report_to", [])
    if name not in names:
        names.append(name)


def _of_lora(path: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if translation.get("adapter") != "lora" or value is None:
            translation.tell(key, "only for LoRA, which is off")
        else:
            translation.put(key, path, value)

    return handle


def _excess(translation: Translation, key: str, value: Any) -> None:
    if translation.stage == "dpo":
        translation.tell(key, "dpo.truncated_completions says it: drop")
    elif value in _OVERLONG:
        translation.put(key, "sft.overlong", _OVERLONG[value])
    else:
        translation.refuse(key, f"must be one of {', '.join(_OVERLONG)}")


def _liger(translation: Translation, key: str, value: Any) -> None:
    """They name the kernels one by one; here all are on or off."""
    if value:
        translation.put(key, "training.use_liger_kernel", True, "all of them")
    else:
        translation.tell(key, "off; one that is on switches all of them on")


def _curriculum(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.put(key, "training.shuffle", False, "rows in the order of the files")
    else:
        translation.tell(key, "off, same here")


def _packing(translation: Translation, key: str, value: Any) -> None:
    if translation.stage == "dpo":
        translation.tell(key, "of sft: Axolotl packs no pairs")
    else:
        translation.put(key, "sft.packing", PACKING(value))


def _packed_in_order(translation: Translation, key: str, value: Any) -> None:
    if value and translation.get("sample_packing") and translation.stage == "sft":
        translation.put(key, "sft.packing", "next_fit", "in the order of the rows")
    else:
        translation.tell(key, "off, same here")


def _preference(translation: Translation, key: str, value: Any) -> None:
    if not value:
        translation.tell(key, "not set: entrypoint sft")
    elif value in _LOSSES:
        translation.put(key, "loss.name", _LOSSES[value])
    else:
        translation.refuse(
            key, f"no counterpart: {', '.join(_LOSSES)} have, and entrypoint dpo has qrpo too"
        )


def _fused_kernel(why: str) -> Ours:
    return Ours(f"{why}: a kernel changes no result")


def choose_stage(given: dict[str, Any]) -> str:
    return "dpo" if given.get("rl") in list(_LOSSES) else "sft"


def defaults_of(translation: Translation) -> dict[str, Any]:
    is_dpo = translation.stage == "dpo"
    return _DEFAULTS | (_DEFAULTS_OF_DPO if is_dpo else _DEFAULTS_OF_SFT)


TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "base_model": use_model,
    "tokenizer_config": use_model,
    "base_model_config": use_model,
    "model_type": Ours("config.json says the class"),
    "type": Ours("config.json says the class"),
    "tokenizer_type": Ours("the tokenizer's files say the class"),
    "is_mistral_derived_model": Ours("config.json says the class"),
    "is_llama_derived_model": Ours("config.json says the class"),
    "trust_remote_code": REMOTE_CODE,
    "plugins": _plugins,
    "strict": Ours("an unknown key is always refused"),
    "load_in_8bit": QUANTIZED,
    "load_in_4bit": QUANTIZED,
    "adapter": _adapter,
    "lora_r": _of_lora("lora.rank"),
    "lora_alpha": _of_lora("lora.alpha"),
    "lora_dropout": _of_lora("lora.dropout"),
    "lora_target_modules": _of_lora("lora.target_modules"),
    "lora_target_linear": Ours("all linear layers but the output"),
    "lora_model_dir": Nothing("a run begins with a new adapter"),
    "lora_fan_in_fan_out": Nothing("weights are of linear layers"),
    "lora_modules_to_save": Nothing("embeddings are not trained beside an adapter"),
    "datasets": use_datasets("data"),
    "test_datasets": use_datasets("evaluation"),
    "chat_template": use_template,
    "chat_template_jinja": use_template,
    "dataset_prepared_path": Becomes("data.cache_dir"),
    "shuffle_merged_datasets": _shuffled,
    "shuffle_before_merging_datasets": Ours("the rows of all datasets are mixed"),
    "dataset_processes": Becomes("data.num_workers"),
    "dataset_num_proc": Becomes("data.num_workers"),
    "dataset_keep_in_memory": Ours("rows are read from prepared files"),
    "dataset_exact_deduplication": Becomes("data.deduplicate"),
    "train_on_inputs": _inputs,
    "special_tokens.pad_token": Becomes("data.special_tokens.pad_token"),
    "special_tokens.eos_token": Becomes("data.special_tokens.eos_token"),
    "special_tokens.bos_token": Becomes("data.special_tokens.bos_token"),
    "special_tokens": Ours("none are changed"),
    "eot_tokens": Ours("a turn ends as the template writes it, and its end is trained"),
    "output_dir": Becomes("run_dir"),
    "flash_attention": _attention,
    "sdp_attention": _attention,
    "xformers_attention": Nothing("flash_attention or sdp_attention are"),
    "s2_attention": Nothing("attention is full"),
    "attn_implementation": _attention_name,
    "flash_attn_rms_norm": Ours("training.use_liger_kernel fuses norms, where an image has it"),
    "flash_attn_cross_entropy": Ours("the loss is computed in chunks, and full logits never exist"),
    "flash_attn_fuse_qkv": Nothing("matrices stay as the model's files have them"),
    "flash_attn_fuse_mlp": Nothing("matrices stay as the model's files have them"),
    "sample_packing": _packing,
    "eval_sample_packing": Ours("rows of the evaluation are never packed"),
    "pad_to_sequence_len": _padding,
    "sample_packing_sequentially": _packed_in_order,
    "curriculum_sampling": _curriculum,
    "sequence_len": use_length,
    "excess_length_strategy": _excess,
    "group_by_length": BY_LENGTH,
    "micro_batch_size": use_micro_batch("gradient_accumulation_steps"),
    "eval_batch_size": Becomes("evaluation.per_device_eval_batch_size"),
    "num_epochs": use_epochs,
    "optimizer": use_optimizer,
    "lr_scheduler": _schedule,
    "cosine_min_lr_ratio": _minimum,
    "val_set_size": _held_out,
    "eval_set_size": _held_out,
    "evals_per_epoch": becomes_if_set(
        "evaluation.evals_per_epoch", "none, the same here (there is one at the end)"
    ),
    "eval_table_size": Nothing("samples of an evaluation are made by `entrypoint generate`"),
    "eval_max_new_tokens": Ours("an evaluation computes the loss; nothing is generated"),
    "saves_per_epoch": becomes_if_set(
        "checkpointing.saves_per_epoch", "none, the same here (there is one at the end)"
    ),
    "auto_resume_from_checkpoints": Ours("a run goes on from its newest checkpoint"),
    "early_stopping_patience": Nothing("a run is as long as it was asked to be"),
    "local_rank": Ours("the launcher says it"),
    "debug": Ours("`post-training data inspect` shows what is trained"),
    "wandb_project": _wandb_project,
    "wandb_entity": Becomes("logging.wandb_entity"),
    "wandb_name": Becomes("logging.wandb_run_name"),
    "wandb_run_id": Ours("the run's own id"),
    "wandb_mode": Ours("the variable WANDB_MODE says it"),
    "wandb_log_model": _WANDB,
    "wandb_watch": _WANDB,
    "use_tensorboard": _tensorboard,
    "ddp_find_unused_parameters": UNUSED_PARAMETERS,
    "rl": _preference,
    "rl_beta": Becomes("loss.beta"),
    "trl.beta": Becomes("loss.beta"),
    "dpo_label_smoothing": Becomes("loss.label_smoothing"),
    "precompute_ref_log_probs": Ours("computed before training where none are stored"),
    "reward_model": Nothing("`entrypoint reward-model` trains rewards, by a config of its own"),
    "process_reward_model": Nothing("rewards are of whole answers"),
    "revision_of_model": use_revision("base_model"),
    "fsdp_version": Ours("fsdp2 computes what version 1 does"),
    "fsdp_config": use_fsdp_config(needs_fsdp=False),
    **dict.fromkeys(
        (
            *("liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm"),
            *("liger_glu_activation", "liger_swiglu"),
        ),
        _liger,
    ),
    **dict.fromkeys(
        (
            *("liger_fused_linear_cross_entropy", "liger_cross_entropy", "cut_cross_entropy"),
            "chunked_cross_entropy",
        ),
        _fused_kernel("the loss is computed in chunks, and full logits never exist"),
    ),
    **dict.fromkeys(
        (
            *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"),
            *("use_kernels", "use_scattermoe", "use_sonicmoe", "experts_implementation"),
            *("fused_attn_kernel", "flex_attn_compile_kwargs", "flash_optimum", "tiled_mlp"),
        ),
        _fused_kernel("how layers are computed is model.attn_implementation's and torch's"),
    ),
    "loss_watchdog_threshold": _WATCHDOG,
    "loss_watchdog_patience": _WATCHDOG,
    "cosine_constant_lr_ratio": Nothing("the cosine goes over the whole run"),
    "eta_min": Nothing("set training.lr_scheduler_kwargs: {min_lr: …} by --set"),
    "activation_offloading": Nothing("training.gradient_checkpointing needs less memory"),
    "unfrozen_parameters": Nothing("the whole model is trained, or lora's addition"),
    "peft_use_rslora": Nothing("the addition is multiplied by alpha / rank: set lora.alpha"),
    "peft_use_dora": Nothing("lora is the plain one"),
    "model_config.output_router_logits": Nothing(
        "a router's loss is the model's own: output_router_logits in its config.json"
    ),
    "lora_target_parameters": Nothing("lora is of linear layers"),
    "special_tokens.unk_token": Ours("no text becomes an unknown token"),
    "tokens": Nothing("`entrypoint init-model` makes room for tokens; no run adds any"),
    "tokenizer_use_fast": Ours("tokenizers are fast ones", (True,)),
    "tokenizer_legacy": Ours("tokenizers are fast ones, which have no older form"),
    "tokenizer_use_mistral_common": Nothing("data.chat_template: mistral-v7-tekken writes it"),
    "processor_type": Nothing("models of text are trained"),
    "skip_prepare_dataset": Nothing("models of text are trained, from prepared rows"),
    "pretraining_dataset": Nothing("`type: completion` in datasets trains texts"),
    "streaming": Nothing("rows are prepared once, before training"),
    "dp_shard_size": Nothing("distributed.strategy: fsdp2 shares among all processes"),
    "dp_replicate_size": Nothing("distributed.strategy: fsdp2 shares among all processes"),
    "context_parallel_size": Becomes("distributed.context_parallel_size"),
    "tensor_parallel_size": Ours("distributed.strategy divides the model", (1,)),
    "expert_parallel_size": Ours("distributed.strategy divides the model", (1,)),
    **dict.fromkeys(("quantize_moe_experts", "fp8", "qat", "gptq"), QUANTIZED),
    **dict.fromkeys(("gptq_groupsize", "gptq_model_v1"), _WITHOUT_USE),
    **dict.fromkeys(
        ("torchdistx_path", "max_packed_sequence_len", "save_first_step", "low_cpu_mem_usage"),
        _WITHOUT_USE,
    ),
    "push_dataset_to_hub": Nothing("nothing is sent to a hub"),
    "hf_use_auth_token": Ours("a run downloads nothing; fetching reads HF_TOKEN"),
    "use_ray": Nothing("Slurm or `entrypoint` itself starts the processes"),
    "ray_num_workers": Ours("of the job: post-training submit --nodes"),
    "use_wandb": _use_wandb,
}


def _default_warmup(translation: Translation) -> None:
    """3% of the steps, and no more than 100. Source: axolotl/core/builders/base.py."""
    training = translation.settings.get("training", {})
    is_said = any(translation.get(key) is not None for key in ("warmup_steps", "warmup_ratio"))
    if is_said or training.get("lr_scheduler_type") == "constant":
        return
    if isinstance(steps := training.get("max_steps"), int):
        # A single step of warmup is two there.
        number = min(int(0.03 * steps), 100)
        translation.put("warmup_steps", "training.warmup", 2 if number == 1 else number)
    else:
        note = "and at most 100 steps: in a run of more than 3,333, --set training.warmup=100"
        translation.put("warmup_ratio", "training.warmup", 0.03, note)


def finish(translation: Translation) -> None:
    """What follows from several keys: the warmup, where none is said; the precision under ZeRO."""
    if translation.stage == "dpo":
        translation.settings.setdefault("dpo", {})
    _default_warmup(translation)
    use_bf16_under_zero(translation)


def use_bf16_under_zero(translation: Translation) -> None:
    """Weights of bfloat16, where DeepSpeed keeps float32 copies."""
    if str(translation.settings.get("distributed", {}).get("strategy")).startswith("zero"):
        if not translation.has("training.mixed_precision"):
            note = "as the DeepSpeed file says"
            translation.put("bf16", "training.mixed_precision", "bf16", note)
        if translation.settings["training"]["mixed_precision"] == "bf16":
            note = "DeepSpeed keeps float32 copies"
            translation.put("torch_dtype", "model.dtype", "bfloat16", note)
