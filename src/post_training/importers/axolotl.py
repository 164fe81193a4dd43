"""Axolotl's YAML (https://docs.axolotl.ai/docs/config-reference.html)."""

from typing import Any

from post_training.importers.training_arguments import (
    ATTENTION,
    BY_LENGTH,
    PACKING,
    TRAINING_ARGUMENTS,
    UNUSED_PARAMETERS,
    tell_dataset,
    use_dataset_path,
    use_epochs,
    use_micro_batch,
    use_model,
    use_optimizer,
)
from post_training.importers.translation import (
    Becomes,
    Nothing,
    Ours,
    Table,
    Translation,
    becomes_if_set,
)

WHOLE = ("gradient_checkpointing_kwargs", "optim_args", "lr_scheduler_kwargs", "deepspeed")
# What Axolotl does where its file says nothing, and we would do otherwise.
DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "lr_scheduler": "cosine",
    "optimizer": "adamw_torch_fused",
    "chat_template": "tokenizer_default",
    "sequence_len": 512,
    "seed": 42,
}
_TEMPLATES = {
    "tokenizer_default": "model",
    "chatml": "chatml",
    "llama3": "llama-3",
    "mistral_v1": "mistral",
    "gemma3": "gemma3",
    "qwen3": "qwen3",
    "qwen_25": "qwen2.5",
    "qwen2_5": "qwen2.5",
    "phi_35": "phi-3.5",
}
_FORMATS = {"chat_template": None, "sharegpt": None, "alpaca": "alpaca", "completion": "text"}
_MESSAGE_FIELDS = {"role": "role", "content": "content"}
_WANDB = Nothing("models and gradients are not sent to W&B; RUN/model has the one")
_8_BIT = Nothing("models are trained in 16 or 32 bits")
_PLUGINS = {
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin": "full logits never exist here",
    "axolotl.integrations.liger.LigerPlugin": "training.use_liger_kernel says it",
}


def _plugins(translation: Translation, key: str, value: Any) -> None:
    for name in value or []:
        if name in _PLUGINS:
            translation.tell(key, f"{name}: no setting needed: {_PLUGINS[name]}")
        else:
            translation.refuse(key, f"no counterpart of {name}; --drop {key} leaves it out")


def _datasets(setting: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        block = translation.settings.setdefault(setting, {})
        block["datasets"] = []
        translation.tell(key, f"{setting}.datasets: {len(value or [])}")
        for index, given in enumerate(value or []):
            dataset = _dataset(translation, f"{key}[{index}]", given)
            block["datasets"].append(dataset)
            tell_dataset(translation, f"{key}[{index}]", given, dataset)

    return handle


def _dataset(translation: Translation, key: str, given: dict[str, Any]) -> dict[str, Any]:
    dataset: dict[str, Any] = {}
    kind = given.get("type", "chat_template")
    refuse = translation.refuse
    if not isinstance(kind, str) or kind.split(".")[0] not in _FORMATS:
        refuse(key, f"type {kind}: no counterpart: chat_template, alpaca and completion are read")
        return dataset
    form = _FORMATS[kind.split(".")[0]]
    use_dataset_path(translation, key, given["path"], dataset)
    is_file = "path" in dataset and "." in given["path"].rsplit("/", 1)[-1]
    for name, value in given.items():
        if name in ("path", "type") or value is None:
            continue
        match name:
            case "split" if is_file:
                translation.tell(
                    f"{key}.split", f"{value}: a file has one split, and no name for it"
                )
            case "split":
                dataset["split"] = value
            case "ds_type":
                translation.tell(f"{key}.ds_type", f"{value}: the file's ending says it")
            case "name":
                dataset["subset"] = value
            case "revision":
                dataset["revision"] = value
            case "field" if form == "text":
                if value != "text":
                    dataset["columns"] = {"text": value}
            case "field_messages":
                dataset["columns"] = {**dataset.get("columns", {}), "messages": value}
            case "field_tools":
                dataset["columns"] = {**dataset.get("columns", {}), "tools": value}
            case "field_system":
                dataset["columns"] = {**dataset.get("columns", {}), "system": value}
            case "message_property_mappings":
                if others := sorted(set(value) - set(_MESSAGE_FIELDS)):
                    refuse(key, f"message_property_mappings.{others[0]}: no counterpart")
                dataset["message_fields"] = {k: v for k, v in value.items() if k in _MESSAGE_FIELDS}
            case "message_field_role" | "message_field_content":
                fields = dataset.setdefault("message_fields", {})
                fields[name.removeprefix("message_field_")] = value
            case "message_field_training":
                dataset.setdefault("message_fields", {})["weight"] = value
            case "roles":
                dataset["roles"] = {
                    theirs: role for role, names in value.items() for theirs in names
                }
            case "roles_to_train" if value == ["assistant"]:
                translation.tell(f"{key}.roles_to_train", "no setting needed: assistant only")
            case "train_on_eos" if value in ("turn", "all"):
                translation.tell(f"{key}.train_on_eos", "no setting needed: the end of each turn")
            case "chat_template":
                _template(translation, f"{key}.chat_template", value)
            case _:
                refuse(key, f"{name}: {value}: no counterpart, or not known here")
    if form is not None:
        dataset["format"] = form
    if "messages" in dataset.get("columns", {}):
        dataset["format"] = "messages"
    return dataset


def _template(translation: Translation, key: str, value: Any) -> None:
    name = _TEMPLATES.get(value, value if str(value).endswith(".jinja") else None)
    if name is None:
        translation.refuse(
            key,
            f"no counterpart: {', '.join(_TEMPLATES)} have; `--set data.chat_template=model` takes "
            f"the tokenizer's own, with --drop {key}",
        )
    else:
        translation.put(key, "data.chat_template", name)


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
    if translation.get("lr_scheduler", DEFAULTS["lr_scheduler"]) != "cosine" and value:
        translation.refuse(key, "belongs to lr_scheduler: cosine")


def _padding(translation: Translation, key: str, value: Any) -> None:
    if value:
        length = translation.get("sequence_len", DEFAULTS["sequence_len"])
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
    if value not in ATTENTION:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")
    else:
        translation.put(key, "model.attn_implementation", ATTENTION[value])


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


def choose_stage(given: dict[str, Any]) -> str:
    return "sft"


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
    "trust_remote_code": Nothing("no code of a model is run: architectures of transformers are"),
    "plugins": _plugins,
    "strict": Ours("an unknown key is always refused"),
    "load_in_8bit": _8_BIT,
    "load_in_4bit": _8_BIT,
    "adapter": _adapter,
    "lora_r": _of_lora("lora.rank"),
    "lora_alpha": _of_lora("lora.alpha"),
    "lora_dropout": _of_lora("lora.dropout"),
    "lora_target_modules": _of_lora("lora.target_modules"),
    "lora_target_linear": Ours("all linear layers but the output"),
    "lora_model_dir": Nothing("a run begins with a new adapter"),
    "lora_fan_in_fan_out": Nothing("weights are of linear layers"),
    "lora_modules_to_save": Nothing("embeddings are not trained beside an adapter"),
    "datasets": _datasets("data"),
    "test_datasets": _datasets("evaluation"),
    "chat_template": _template,
    "chat_template_jinja": _template,
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
    "sample_packing": Becomes("sft.packing", PACKING),
    "eval_sample_packing": Ours("rows of the evaluation are never packed"),
    "pad_to_sequence_len": _padding,
    "sequence_len": Becomes("sft.max_seq_length"),
    "excess_length_strategy": Becomes("sft.overlong"),
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
    "rl": Nothing("`entrypoint dpo` trains preferences; the importer translates only sft"),
}


def _default_warmup(translation: Translation) -> None:
    """3% of the steps, and no more than 100. Source: axolotl/core/builders/base.py."""
    training = translation.settings.get("training", {})
    is_said = any(translation.get(key) is not None for key in ("warmup_steps", "warmup_ratio"))
    if is_said or training.get("lr_scheduler_type") == "constant":
        return
    if steps := training.get("max_steps"):
        # A single step of warmup is two there.
        number = min(int(0.03 * steps), 100)
        translation.put("warmup_steps", "training.warmup", 2 if number == 1 else number)
    else:
        note = "and at most 100 steps: in a run of more than 3,333, --set training.warmup=100"
        translation.put("warmup_ratio", "training.warmup", 0.03, note)


def finish(translation: Translation) -> None:
    """What follows from several keys: the warmup, where none is said; the precision under ZeRO."""
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
