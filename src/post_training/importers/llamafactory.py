"""LLaMA-Factory's YAML (https://github.com/hiyouga/LLaMA-Factory, examples), and its
dataset_info.json."""

from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.importers.documents import read_document
from post_training.importers.training_arguments import (
    ATTENTION,
    NEW_TOKENS,
    PLAIN_LORA,
    QUANTIZED,
    REMOTE_CODE,
    TRAINING_ARGUMENTS,
    tell_dataset,
    use_dataset_path,
    use_length,
    use_model,
    use_pure_bf16,
    use_revision,
)
from post_training.importers.translation import Becomes, Nothing, Ours, Table, Translation
from post_training.importers.trl import LOSSES, finish_shared

WHOLE = (
    "lr_scheduler_kwargs",
    "gradient_checkpointing_kwargs",
    "optim_args",
    "deepspeed",
    "fsdp_config",
)
_TUNING = "lora"
_DEFAULTS: dict[str, Any] = {
    "finetuning_type": _TUNING,
    "lora_rank": 8,
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "cutoff_len": 2048,
    "template": None,
    "save_total_limit": None,
    "seed": 42,
}
_STAGES = {"sft": "sft", "dpo": "dpo", "rm": "reward-model"}
_DEFAULTS_OF_DPO = {"pref_beta": 0.1, "pref_loss": "sigmoid"}
_TEMPLATES = {
    "llama3": "llama-3",
    "qwen": "qwen2.5",
    "qwen3": "qwen3",
    "qwen3_nothink": "chatml",
    "gemma": "gemma3",
    "gemma3": "gemma3",
    "mistral": "mistral",
    "zephyr": "zephyr",
    "chatml": "chatml",
    "gpt": "gpt-oss",
    "phi": "phi-3",
}
_OTHER_LOSS = Nothing("losses of entrypoint sft are sft, plw, ln-plw and irl")
_OTHER_OPTIMIZER = Nothing("training.optimizer names those that there are")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
_RANKED = {"prompt": "prompt", "query": "input", "system": "system"}
_RANKED |= {"chosen": "chosen", "rejected": "rejected"}
_SHAREGPT_RANKED = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
_TAGS = {"role_tag": "role", "content_tag": "content"}
_ROLES = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}
_ROLES |= {"observation_tag": "tool", "function_tag": "assistant"}


def defaults_of(translation: Translation) -> dict[str, Any]:
    return _DEFAULTS | (_DEFAULTS_OF_DPO if translation.stage == "dpo" else {})


def choose_stage(given: dict[str, Any]) -> str:
    return _STAGES.get(str(given.get("stage")), "sft")


def _stage(translation: Translation, key: str, value: Any) -> None:
    if value in list(_STAGES):
        translation.tell(key, f"the stage: entrypoint {_STAGES[value]}")
    else:
        translation.refuse(
            key,
            f"must be one of {', '.join(_STAGES)}; `entrypoint sft` trains plain texts too "
            "(format: text)",
        )


def _datasets(translation: Translation, key: str, value: Any) -> None:
    """Names in dataset_info.json of dataset_dir: of `dataset`, or of `eval_dataset`."""
    if not value:
        translation.tell(key, "none, same here")
        return
    folder = Path(translation.get("dataset_dir", "data"))
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    try:
        known, _ = read_document(folder / "dataset_info.json")
    except UsageError as error:
        translation.refuse(key, f"its names are those of dataset_dir's dataset_info.json: {error}")
        return
    found = []
    for name in names:
        if name not in known:
            translation.refuse(key, f"{name} is not in {folder / 'dataset_info.json'}")
        else:
            dataset = _dataset(translation, key, name, known[name], folder)
            found.append(dataset)
            tell_dataset(translation, f"{key}.{name}", known[name], dataset)
    block = "evaluation" if key == "eval_dataset" else "data"
    translation.settings.setdefault(block, {})["datasets"] = found
    translation.tell(key, f"{block}.datasets: {', '.join(names)}")


def _dataset(
    translation: Translation, key: str, name: str, given: dict[str, Any], folder: Path
) -> dict[str, Any]:
    dataset: dict[str, Any] = {"name": name}
    if "hf_hub_url" in given:
        use_dataset_path(translation, key, given["hf_hub_url"], dataset)
        dataset["split"] = given.get("split", "train")
        if "subset" in given:
            dataset["subset"] = given["subset"]
    else:
        dataset["path"] = str(folder / given.get("file_name", name))
    columns = given.get("columns", {})
    known_columns = {"messages", "system", "tools"}
    if given.get("formatting", "alpaca") == "sharegpt":
        if given.get("ranking"):
            dataset["transform"] = "sharegpt_preference"
            if other := {k: v for k, v in columns.items() if v != _SHAREGPT_RANKED.get(k)}:
                translation.refuse(
                    key,
                    f"{name}: columns {other}: `transform: sharegpt_preference` reads "
                    f"{', '.join(_SHAREGPT_RANKED.values())}; rename them in the file",
                )
            known_columns = set(columns)  # the others have just been refused
        elif "messages" in columns:
            dataset["columns"] = {"messages": columns["messages"]}
            dataset["columns"] |= {k: columns[k] for k in ("system", "tools") if k in columns}
            dataset["format"] = "messages"
        tags = given.get("tags", {})
        unread = sorted(set(tags) - set(_TAGS) - set(_ROLES))
        _refuse_unread(translation, key, f"{name}: tags", unread)
        if fields := {ours: tags[theirs] for theirs, ours in _TAGS.items() if theirs in tags}:
            dataset["message_fields"] = fields
        if roles := {tags[theirs]: role for theirs, role in _ROLES.items() if theirs in tags}:
            dataset["roles"] = roles
    elif given.get("ranking"):
        # Their names where dataset_info.json gives none; a filled `input` is refused, with a hint.
        of_file = columns or {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        dataset["columns"] = {_RANKED[k]: v for k, v in of_file.items() if k in _RANKED}
        dataset["format"] = "preference"
        known_columns = set(_RANKED)
    else:
        known_columns = set(_ALPACA)
        if columns:
            dataset["columns"] = {_ALPACA[k]: v for k, v in columns.items() if k in _ALPACA}
        dataset["format"] = "alpaca"
    _refuse_unread(translation, key, f"{name}: columns", sorted(set(columns) - known_columns))
    known = {"hf_hub_url", "split", "subset", "file_name", "columns", "formatting", "tags"}
    for other in sorted(set(given) - known - {"ranking"}):
        translation.refuse(key, f"{name}: {other}: no counterpart, or not known here")
    if most := translation.get("max_samples"):
        dataset["max_rows"] = most
    return dataset


def _refuse_unread(translation: Translation, key: str, what: str, names: list[str]) -> None:
    for name in names:
        translation.refuse(
            key, f"{what}.{name}: no counterpart: name the rows by --set data.datasets=…"
        )


def _template(translation: Translation, key: str, value: Any) -> None:
    if value is None:
        translation.put(key, "data.chat_template", "model", "the tokenizer's own")
    elif value in _TEMPLATES:
        translation.put(key, "data.chat_template", _TEMPLATES[value])
    else:
        translation.refuse(
            key,
            f"no counterpart: {', '.join(_TEMPLATES)} have; --set data.chat_template=model takes "
            f"the tokenizer's own, with --drop {key}",
        )


def _tuning(translation: Translation, key: str, value: Any) -> None:
    if value == "lora":
        translation.settings.setdefault("lora", {})
        translation.tell(key, "lora")
    elif value == "full":
        translation.tell(key, "the whole model, same here")
    else:
        translation.refuse(key, "no counterpart: full and lora are")


def _of_lora(path: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if translation.get("finetuning_type", _TUNING) != "lora":
            translation.tell(key, "only for LoRA, which is off")
        elif path.endswith("modules"):
            if value == "all":
                translation.tell(key, "all linear layers but the output, same here")
            else:
                translation.put(key, path, [name.strip() for name in value.split(",")])
        else:
            translation.put(key, path, value)

    return handle


def _attention(translation: Translation, key: str, value: Any) -> None:
    if value in ATTENTION:
        translation.put(key, "model.attn_implementation", ATTENTION[value])
    else:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")


def _preference_loss(translation: Translation, key: str, value: Any) -> None:
    try:
        translation.put(key, "loss.name", LOSSES(value))
    except ValueError as error:
        translation.refuse(key, str(error))


def _length(translation: Translation, key: str, value: Any) -> None:
    """Their cut: infer_seqlen in src/llamafactory/data/processor/processor_utils.py."""
    use_length(translation, key, value)
    if translation.stage == "sft":
        translation.notes.append(
            "a chat over cutoff_len loses its end here; LLaMA-Factory shortens a turn's prompt and "
            "answer in proportion, so that some of both is left. sft.overlong has other ways"
        )


def _packing(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.put(key, "sft.packing", "bfd", "sequences do not see each other")
    else:
        translation.tell(key, "off, same here")


TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": use_model,
    "trust_remote_code": REMOTE_CODE,
    "rope_scaling": Nothing("config.json says it: put rope_scaling into that of a copy"),
    "flash_attn": _attention,
    "attn": _attention,
    "enable_liger_kernel": Becomes("training.use_liger_kernel"),
    "stage": _stage,
    "finetuning_type": _tuning,
    "lora_rank": _of_lora("lora.rank"),
    "lora_alpha": _of_lora("lora.alpha"),
    "lora_dropout": _of_lora("lora.dropout"),
    "lora_target": _of_lora("lora.target_modules"),
    "dataset": _datasets,
    "dataset_dir": Ours("it goes with dataset"),
    "eval_dataset": _datasets,
    "template": _template,
    "cutoff_len": _length,
    "max_samples": Ours("the first rows of each dataset: max_rows"),
    "overwrite_cache": Ours("prepared data is found again only where nothing changed"),
    "preprocessing_num_workers": Becomes("data.num_workers"),
    "packing": _packing,
    "neat_packing": _packing,
    "train_on_prompt": lambda t, key, value: (
        t.put(key, "loss", {"name": "sft"}) if value else t.tell(key, "only answers, same here")
    ),
    "mask_history": lambda t, key, value: (
        t.put(key, "data.train_on", "last_turn") if value else t.tell(key, "all turns, same here")
    ),
    "val_size": Nothing("`entrypoint split` makes the rows to evaluate on, once"),
    "pref_beta": Becomes("loss.beta"),
    "pref_loss": _preference_loss,
    "ref_model": Becomes("reference.ref_model_name_or_path"),
    "pure_bf16": use_pure_bf16,
    "model_revision": use_revision("model_name_or_path"),
    "disable_gradient_checkpointing": lambda t, key, value: t.put(
        key, "training.gradient_checkpointing", not value
    ),
    "disable_shuffling": lambda t, key, value: t.put(key, "training.shuffle", not value),
    "dpo_label_smoothing": Becomes("loss.label_smoothing"),
    "pref_ftx": Nothing("the loss of a pair has no part of sft"),
    "simpo_gamma": Ours("of simpo, which pref_loss names"),
    "mix_strategy": Ours("the rows of all datasets are mixed", ("concat",)),
    "interleave_probs": Nothing("set the weight of each dataset by --set"),
    "streaming": Nothing("rows are prepared once, before training"),
    "default_system": Nothing("rows say the system message"),
    "enable_thinking": Nothing("the template says what becomes of thoughts"),
    "tool_format": Nothing("the template says how tools are written"),
    "new_special_tokens_config": NEW_TOKENS,
    "add_special_tokens": NEW_TOKENS,
    "add_tokens": NEW_TOKENS,
    "moe_aux_loss_coef": Nothing("a router's loss is the model's own, as its config.json says"),
    "early_stopping_steps": Nothing("a run is as long as it was asked to be"),
    "use_fast_tokenizer": Ours("tokenizers are fast ones", (True,)),
    "split_special_tokens": Nothing("special tokens are those of the tokenizer"),
    "create_new_adapter": Ours("a run begins with a new adapter"),
    "shift_attn": Nothing("attention is full"),
    "train_from_scratch": Nothing("`entrypoint init-model` makes a model of random weights"),
    "use_unsloth": Nothing("training.use_liger_kernel fuses layers"),
    "use_swanlab": Nothing("logging.report_to has wandb and tensorboard"),
    **dict.fromkeys(
        (
            *("use_unsloth_gc", "low_cpu_mem_usage", "upcast_layernorm", "device_map"),
            *("preprocessing_batch_size", "data_shared_file_system", "print_param_status"),
            *("ignore_pad_token_for_loss", "use_v1_kernels", "compute_accuracy"),
            *("eval_on_each_dataset", "cache_dir", "media_dir", "hf_hub_token"),
            *("include_effective_tokens_per_second", "use_kv_cache"),
        ),
        Ours("how it is computed, read or shown changes no result"),
    ),
    "adapter_name_or_path": Nothing("a run begins with a new adapter"),
    "resize_vocab": NEW_TOKENS,
    "tokenized_path": Nothing(
        "`entrypoint prepare` writes prepared rows; data.cache_dir keeps them"
    ),
    "predict_with_generate": Nothing("`entrypoint generate` does it"),
    "use_dft_loss": _OTHER_LOSS,
    "use_asft_loss": _OTHER_LOSS,
    "use_eaft_loss": _OTHER_LOSS,
    "asft_alpha": _OTHER_LOSS,
    "pissa_init": PLAIN_LORA,
    "pissa_iter": PLAIN_LORA,
    "pissa_convert": PLAIN_LORA,
    "loraplus_lr_ratio": PLAIN_LORA,
    "use_rslora": PLAIN_LORA,
    "use_dora": PLAIN_LORA,
    "additional_target": PLAIN_LORA,
    "use_galore": _OTHER_OPTIMIZER,
    "use_apollo": _OTHER_OPTIMIZER,
    "use_badam": _OTHER_OPTIMIZER,
    "use_adam_mini": _OTHER_OPTIMIZER,
    "use_muon": _OTHER_OPTIMIZER,
    **dict.fromkeys(
        (
            *("galore_layerwise", "galore_target", "galore_rank", "galore_scale"),
            *("apollo_layerwise", "apollo_target", "apollo_rank", "apollo_scale"),
            *("apollo_scale_type", "badam_mode", "badam_switch_mode", "badam_switch_interval"),
            *("badam_verbose", "oft_block_size", "oft_target", "freeze_trainable_layers"),
            *("freeze_trainable_modules", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
        ),
        Ours("part of another setting, which has no counterpart"),
    ),
    "use_llama_pro": Nothing("no layers are added to a model"),
    "mixture_of_depths": Nothing("no layers are added to a model"),
    "fp8": QUANTIZED,
    "quantization_bit": QUANTIZED,
    "quantization_method": QUANTIZED,
    "double_quantization": QUANTIZED,
    "ray_num_workers": Ours("of the job: post-training submit --nodes"),
    **dict.fromkeys(
        (
            *("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"),
            *("video_fps", "video_maxlen", "freeze_vision_tower", "freeze_multi_modal_projector"),
            "freeze_language_model",
        ),
        Ours("of images and videos, and models of text are trained"),
    ),
}


def finish(translation: Translation) -> None:
    """What follows from several keys: alpha, which is twice the rank where none is said."""
    if rank := (translation.settings.get("lora") or {}).get("rank"):
        translation.put("lora_alpha", "lora.alpha", 2 * rank, "twice the rank")
    finish_shared(translation)
