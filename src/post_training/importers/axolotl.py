"""Axolotl's YAML (https://docs.axolotl.ai/docs/config-reference.html)."""

from typing import Any

from post_training.importers.axolotl_no_setting import NO_SETTING
from post_training.importers.axolotl_rows import use_datasets, use_template
from post_training.importers.fsdp import use_fsdp_config
from post_training.importers.training_arguments import (
    ATTENTION,
    BY_LENGTH,
    PACKING,
    TRAINING_ARGUMENTS,
    UNUSED_PARAMETERS,
    use_epochs,
    use_length,
    use_micro_batch,
    use_model,
    use_optimizer,
    use_pure_bf16,
    use_revision,
)
from post_training.importers.translation import (
    Becomes,
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
    "accelerator_config",
    "loftq_config",
    "qat",
    "ebft",
    "vllm",
    "diffusion",
    "llmcompressor",
    "overrides_of_model_config",
    "overrides_of_model_kwargs",
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
    "save_total_limit": 4,
    "seed": 42,
}
_DEFAULTS_OF_SFT = {"sequence_len": 512, "excess_length_strategy": "drop"}
_DEFAULTS_OF_DPO = {"rl_beta": 0.1}
_LOSSES = {"dpo": "dpo", "ipo": "ipo"}
_BY_KEY = {
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
}
_OTHER_NAMES = {"flash_attn2": "fa2", "flash_attn3": "fa3", "vllm_flash_attn3": "fa3"}
_OVERLONG = {"drop": "drop", "truncate": "truncate", "raise": "fail", None: "drop"}
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
    if value and translation.stage != "sft":
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
        name = _BY_KEY.get(key, "varlen")
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
        translation.refuse(
            key, f"no counterpart of {value}; `{key}=lora` behind the file takes lora instead"
        )
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
    if translation.stage != "sft":
        translation.tell(key, "truncated_completions says it: a pair that would be cut is dropped")
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
    if translation.stage != "sft":
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


def _flattening(translation: Translation, key: str, value: Any) -> None:
    """A micro-batch in one row, where rows are not packed."""
    if value and not translation.get("sample_packing"):
        translation.put(key, "training.padding_free", True)
    else:
        translation.tell(key, "off, same here")


def _pair_losses(translation: Translation, key: str, value: Any) -> None:
    names = {"sigmoid": "dpo", "ipo": "ipo", "hinge": "hinge"}
    one = value[0] if isinstance(value, list) and len(value) == 1 else value
    if one in list(names):
        translation.put(key, "loss.name", names[one])
    else:
        translation.refuse(key, f"must be one of {', '.join(names)}")


def _centering(translation: Translation, key: str, value: Any) -> None:
    if translation.stage == "reward-model":
        translation.put(key, "center_rewards_coefficient", value)
    else:
        translation.tell(key, "of reward_model, which is off")


def _prompt_length(translation: Translation, key: str, value: Any) -> None:
    if translation.stage == "dpo":
        translation.put(key, "dpo.max_prompt_length", value)
    else:
        translation.tell(key, "of rl, which is off")


def choose_stage(given: dict[str, Any]) -> str:
    if given.get("reward_model"):
        return "reward-model"
    return "dpo" if given.get("rl") in list(_LOSSES) else "sft"


def defaults_of(translation: Translation) -> dict[str, Any]:
    of_stage = {"sft": _DEFAULTS_OF_SFT, "dpo": _DEFAULTS_OF_DPO}
    return _DEFAULTS | of_stage.get(translation.stage, {})


TABLE: Table = {
    **TRAINING_ARGUMENTS,
    **NO_SETTING,
    "base_model": use_model,
    "tokenizer_config": use_model,
    "base_model_config": use_model,
    "plugins": _plugins,
    "adapter": _adapter,
    "lora_r": _of_lora("lora.rank"),
    "lora_alpha": _of_lora("lora.alpha"),
    "lora_dropout": _of_lora("lora.dropout"),
    "lora_target_modules": _of_lora("lora.target_modules"),
    "datasets": use_datasets("data"),
    "test_datasets": use_datasets("evaluation"),
    "chat_template": use_template,
    "chat_template_jinja": use_template,
    "dataset_prepared_path": Becomes("data.cache_dir"),
    "shuffle_merged_datasets": _shuffled,
    "dataset_processes": Becomes("data.num_workers"),
    "dataset_num_proc": Becomes("data.num_workers"),
    "dataset_exact_deduplication": Becomes("data.deduplicate"),
    "train_on_inputs": _inputs,
    "special_tokens.pad_token": Becomes("data.special_tokens.pad_token"),
    "special_tokens.eos_token": Becomes("data.special_tokens.eos_token"),
    "special_tokens.bos_token": Becomes("data.special_tokens.bos_token"),
    "output_dir": Becomes("run_dir"),
    "flash_attention": _attention,
    "sdp_attention": _attention,
    "flex_attention": _attention,
    "eager_attention": _attention,
    "bfloat16": use_pure_bf16,
    "pad_to_multiple_of": Becomes("training.pad_to_multiple_of"),
    "batch_flattening": _flattening,
    "dpo_padding_free": Becomes("training.padding_free"),
    "dpo_beta": Becomes("loss.beta"),
    "dpo_loss_type": _pair_losses,
    "max_prompt_len": _prompt_length,
    "sequence_parallel_degree": Becomes("distributed.context_parallel_size"),
    "attn_implementation": _attention_name,
    "sample_packing": _packing,
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
    "saves_per_epoch": becomes_if_set(
        "checkpointing.saves_per_epoch", "none, the same here (there is one at the end)"
    ),
    "wandb_project": _wandb_project,
    "wandb_entity": Becomes("logging.wandb_entity"),
    "wandb_name": Becomes("logging.wandb_run_name"),
    "use_tensorboard": _tensorboard,
    "ddp_find_unused_parameters": UNUSED_PARAMETERS,
    "rl": _preference,
    "reward_model": Ours("the stage says it"),
    "num_labels": Ours("a reward is one number", (1,)),
    "center_rewards_coefficient": _centering,
    "rl_beta": Becomes("loss.beta"),
    "trl.beta": Becomes("loss.beta"),
    "dpo_label_smoothing": Becomes("loss.label_smoothing"),
    "revision_of_model": use_revision("base_model"),
    "fsdp_config": use_fsdp_config(needs_fsdp=False),
    **dict.fromkeys(
        (
            *("liger_rope", "liger_rms_norm", "liger_rms_norm_gated", "liger_layer_norm"),
            *("liger_glu_activation", "liger_swiglu"),
        ),
        _liger,
    ),
    "context_parallel_size": Becomes("distributed.context_parallel_size"),
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
    if not any(translation.get(key) for key in ("save_steps", "saves_per_epoch", "save_strategy")):
        translation.put("save_strategy", "checkpointing.saves_per_epoch", 1)
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
