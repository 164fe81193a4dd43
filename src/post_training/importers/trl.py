"""TRL's `trl sft --config` and `trl dpo --config` (https://huggingface.co/docs/trl/clis); the keys
of open-instruct's finetune.py and dpo_tune.py that differ."""

from typing import Any

from post_training.importers.training_arguments import (
    ATTENTION,
    PACKING,
    QUANTIZED,
    REMOTE_CODE,
    TRAINING_ARGUMENTS,
    use_dtype,
    use_epochs,
    use_kept_checkpoints,
    use_length,
    use_model,
    use_revision,
)
from post_training.importers.translation import Becomes, Nothing, Ours, Table, Translation, choose
from post_training.importers.trl_rows import ROWS

WHOLE = (
    "gradient_checkpointing_kwargs",
    "lr_scheduler_kwargs",
    "optim_args",
    "deepspeed",
    "liger_kernel_config",
    "dataset_mixer",
    "fsdp_config",
    "env",
)
_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "bf16": True,
    "max_length": 1024,
    "chat_template_path": None,
    "save_total_limit": None,
    "seed": 42,
}
_DEFAULTS_OF_DPO = {"learning_rate": 1e-6, "beta": 0.1, "loss_type": "sigmoid"}
# Of open-instruct's finetune.py and dpo.py. Without max_seq_length they cut nothing.
_OF_OPEN_INSTRUCT: dict[str, Any] = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.03,
    "weight_decay": 0.0,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "bf16": True,
    "chat_template_path": None,
    "keep_last_n_checkpoints": 3,
    "seed": 42,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
}
# Keys that it has and TRL has not.
_KEYS_OF_OPEN_INSTRUCT = {
    "dataset_mixer",
    "dataset_mixer_list",
    "mixer_list",
    "dataset_mix_dir",
    "max_train_samples",
    "num_epochs",
    "hf_metadata_dataset",
    "try_launch_beaker_eval_jobs",
    "gamma_beta_ratio",
    "use_flash_attn",
    "use_slow_tokenizer",
    "preprocessing_num_workers",
    "use_lora",
    "lora_rank",
    "with_tracking",
    "exp_name",
    "checkpointing_steps",
    "keep_last_n_checkpoints",
    "clip_grad_norm",
    "reduce_loss",
    "dpo_beta",
    "dpo_loss_type",
}
LOSSES = choose(sigmoid="dpo", dpo="dpo", dpo_norm="dpo-norm", hinge="hinge", ipo="ipo")
LOSSES_OF_SFT = ("nll", "chunked_nll")
_REVERSE = ("reverse_kl",)
_OF_DPO = (
    "beta",
    "gamma_beta_ratio",
    "num_epochs",  # of open-instruct, whose sft has num_train_epochs
    "ref_model_name_or_path",
    "precompute_ref_log_probs",
    "dpo_beta",
    "dpo_loss_type",
)


def defaults_of(translation: Translation) -> dict[str, Any]:
    """Those of the program that the keys are of."""
    given, is_dpo = translation.given, translation.stage == "dpo"
    if not _is_open_instruct(translation):
        return _DEFAULTS | (_DEFAULTS_OF_DPO if is_dpo else {})
    defaults = dict(_OF_OPEN_INSTRUCT)
    if is_dpo and given.keys() & {"dpo_beta", "dpo_loss_type"}:  # as its older versions call them
        defaults |= {"dpo_beta": 0.1, "dpo_loss_type": "dpo"}
    elif is_dpo:
        del defaults["num_train_epochs"]
        defaults |= {"beta": 5.0, "loss_type": "dpo_norm", "num_epochs": 1, "warmup_ratio": 0.1}
    if given.get("warmup_steps"):
        del defaults["warmup_ratio"]
    return defaults


def _is_open_instruct(translation: Translation) -> bool:
    return bool(translation.given.keys() & _KEYS_OF_OPEN_INSTRUCT)


def choose_stage(given: dict[str, Any]) -> str:
    """dpo where a key of it is set."""
    loss = given.get("loss_type")
    loss = loss[0] if isinstance(loss, list) and loss else loss
    is_dpo = any(given.get(key) is not None for key in _OF_DPO) or (
        loss is not None and loss not in LOSSES_OF_SFT
    )
    return "dpo" if is_dpo else "sft"


def _target_modules(translation: Translation, key: str, value: Any) -> None:
    if not (translation.get("use_peft") or translation.get("use_lora")):
        translation.tell(key, "only for LoRA, which is off")
    elif value in (None, "all-linear", ["all-linear"]):
        translation.tell(key, "all linear layers but the output")
    else:
        translation.put(key, "lora.target_modules", [value] if isinstance(value, str) else value)


def _assistant_only(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.tell(key, "no setting needed: only answers are trained")
    else:
        translation.tell(key, "see the note on it")


def _loss(translation: Translation, key: str, value: Any) -> None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if translation.stage == "dpo":
        try:
            translation.put(key, "loss.name", LOSSES(value))
        except ValueError as error:
            translation.refuse(key, str(error))
    elif value in LOSSES_OF_SFT:
        translation.tell(key, "no setting needed: the likelihood of each token")
    else:
        translation.refuse(key, "no counterpart: nll is")


def _completion_only(translation: Translation, key: str, value: Any) -> None:
    if value is False:
        translation.put(key, "loss", {"name": "sft"}, "all tokens")
    else:
        translation.tell(key, "no setting needed: only answers are trained")


def _template(translation: Translation, key: str, value: Any) -> None:
    if value is None:
        translation.put(key, "data.chat_template", "model", "the tokenizer's own")
    elif str(value).endswith(".jinja") or key == "chat_template_name":
        translation.put(key, "data.chat_template", value)
    else:
        translation.refuse(key, "must be a .jinja file; a tokenizer's own is taken with its model")


def _attention(translation: Translation, key: str, value: Any) -> None:
    name = str(value).lower().removeprefix("kernels-community/").replace("-", "_")
    name = {"flash_attn2": "flash_attention_2", "flash_attn3": "flash_attention_3"}.get(name, name)
    if name in ATTENTION:
        translation.put(key, "model.attn_implementation", ATTENTION[name])
    elif value:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")
    else:
        translation.tell(key, "sdpa, same here")


def _adapter(translation: Translation, key: str, value: Any) -> None:
    if value:
        translation.settings.setdefault("lora", {})
    translation.tell(key, "lora" if value else "none, same here")


def _of_adapter(path: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if translation.get("use_peft") or translation.get("use_lora"):
            translation.put(key, path, [value] if path.endswith("modules") else value)
        else:
            translation.tell(key, "only for LoRA, which is off")

    return handle


def _packing(translation: Translation, key: str, value: Any) -> None:
    """open-instruct's is a micro-batch without padding, and not rows that several share."""
    if _is_open_instruct(translation):
        translation.put(key, "training.padding_free", bool(value))
    elif translation.stage == "dpo":
        translation.put(key, "dpo.packing", PACKING(value))
    else:
        translation.put(key, "sft.packing", PACKING(value))


def _zero_stage(translation: Translation, key: str, value: Any) -> None:
    if value in (1, 2, 3):
        translation.put(key, "distributed.strategy", f"zero{value}")
    else:
        translation.tell(key, "none, same here")


def _offload(ours: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if value:
            translation.put(key, "distributed.offload", ours)
        else:
            translation.tell(key, "off, same here")

    return handle


def _packing_kind(translation: Translation, key: str, value: Any) -> None:
    if translation.get("packing"):
        translation.put(key, "sft.packing", PACKING(value))
    else:
        translation.tell(key, "nothing is packed")


def _clipping(translation: Translation, key: str, value: Any) -> None:
    if value is not None and value > 0:
        translation.put(key, "training.max_grad_norm", value)
    else:
        translation.tell(key, "DeepSpeed, by which it is started, clips at 1, same here")


def _checkpointing_steps(translation: Translation, key: str, value: Any) -> None:
    if value == "epoch":
        translation.put(key, "checkpointing.saves_per_epoch", 1)
    else:
        translation.put(key, "checkpointing.save_steps", int(value))


_ROUTER = Nothing(
    "a router's loss is the model's own: output_router_logits and router_aux_loss_coef in "
    "config.json"
)
TABLE: Table = {
    **TRAINING_ARGUMENTS,
    "model_name_or_path": use_model,
    "tokenizer_name_or_path": use_model,
    "tokenizer_name": use_model,
    "model_revision": use_revision("model_name_or_path"),
    "trust_remote_code": REMOTE_CODE,
    "attn_implementation": _attention,
    "use_flash_attn": lambda t, key, value: _attention(t, key, "fa2" if value else "sdpa"),
    "torch_dtype": use_dtype,
    "dtype": use_dtype,
    "use_peft": _adapter,
    "use_lora": _adapter,
    "lora_r": _of_adapter("lora.rank"),
    "lora_rank": _of_adapter("lora.rank"),
    "lora_alpha": _of_adapter("lora.alpha"),
    "lora_dropout": _of_adapter("lora.dropout"),
    "lora_target_modules": _target_modules,
    "lora_modules_to_save": Nothing("embeddings are not trained beside an adapter"),
    "lora_target_parameters": Nothing("lora is of linear layers"),
    "lora_task_type": Ours("the stage says the task", ("CAUSAL_LM",)),
    "use_rslora": Nothing("the addition is multiplied by alpha / rank: set lora.alpha"),
    "use_dora": Nothing("lora is the plain one"),
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "bnb_4bit_quant_storage", "use_bnb_nested_quant"),
        Ours("it goes with load_in_4bit"),
    ),
    "model_init_kwargs": Nothing("config.json of the model's folder says it"),
    "disable_dropout": Ours("config.json says the dropout, which is 0 in present models"),
    "router_aux_loss_coef": _ROUTER,
    "activation_offloading": Nothing("training.gradient_checkpointing needs less memory"),
    "load_in_8bit": QUANTIZED,
    "load_in_4bit": QUANTIZED,
    "use_qlora": QUANTIZED,
    **ROWS,
    "dataset_num_proc": Becomes("data.num_workers"),
    "preprocessing_num_workers": Becomes("data.num_workers"),
    "max_length": use_length,
    "max_seq_length": use_length,
    "max_prompt_length": Becomes("dpo.max_prompt_length"),
    "max_completion_length": Becomes("dpo.max_completion_length"),
    "packing": _packing,
    "packing_strategy": _packing_kind,
    "padding_free": Becomes("training.padding_free"),
    "pad_to_multiple_of": Becomes("training.pad_to_multiple_of"),
    "completion_only_loss": _completion_only,
    "assistant_only_loss": _assistant_only,
    "chat_template_path": _template,
    "chat_template_name": _template,
    "eos_token": Becomes("data.special_tokens.eos_token"),
    "pad_token": Becomes("data.special_tokens.pad_token"),
    "loss_type": _loss,
    "dpo_loss_type": _loss,
    "beta": Becomes("loss.beta"),
    "dpo_beta": Becomes("loss.beta"),
    "label_smoothing": Becomes("loss.label_smoothing"),
    "ref_model_name_or_path": Becomes("reference.ref_model_name_or_path"),
    "loss_weights": Nothing("a run has one loss"),
    "f_divergence_type": Ours(
        "the divergence is the reverse one of Kullback and Leibler", _REVERSE
    ),
    "sync_ref_model": Nothing("the reference stays as it is"),
    "ref_model_mixup_alpha": Ours("it goes with sync_ref_model"),
    "ref_model_sync_steps": Ours("it goes with sync_ref_model"),
    "use_weighting": Nothing("each pair weighs the same"),
    "ld_alpha": Nothing("each token of an answer weighs the same"),
    "precompute_ref_batch_size": Ours("logprobs of the reference need no batch of their own"),
    "precompute_ref_log_probs": Ours("logprobs of the reference are computed before training"),
    "use_slow_tokenizer": Ours("tokenizers are fast ones, as open-instruct's now are in any case"),
    "num_epochs": use_epochs,
    "max_train_steps": TRAINING_ARGUMENTS["max_steps"],
    "dataset_mix_dir": Ours("data.cache_dir keeps prepared rows, where it is set"),
    "overwrite_cache": Ours("prepared data is found again only where nothing changed"),
    "add_bos": Nothing(
        "a text begins with BOS where the tokenizer or its template writes one: put {{ bos_token "
        "}} first in a .jinja file, and name it by --set data.chat_template=…"
    ),
    "gamma_beta_ratio": Nothing("simpo is none of the losses of entrypoint dpo"),
    "load_balancing_loss": _ROUTER,
    "load_balancing_weight": _ROUTER,
    "zero_stage": _zero_stage,
    "offload_optimizer": _offload("optimizer"),
    "offload_param": _offload("parameters"),
    "concatenated_forward": Ours("both answers of a pair are in one micro-batch"),
    "hf_metadata_dataset": Ours("figures of evaluations are sent nowhere"),
    "try_launch_beaker_eval_jobs": Ours("no evaluation jobs are started"),
    "try_auto_save_to_beaker": Ours("RUN/model is the model"),
    "do_not_randomize_output_dir": Ours("run_dir is the folder, as it is named"),
    "hf_entity": TRAINING_ARGUMENTS["hub_model_id"],
    "hf_repo_id": TRAINING_ARGUMENTS["hub_model_id"],
    "hf_repo_revision": TRAINING_ARGUMENTS["hub_model_id"],
    "wandb_project_name": Becomes("logging.wandb_project"),
    "wandb_entity": Becomes("logging.wandb_entity"),
    "env": Ours("variables are set where the command is given, or in the EDF"),
    "with_tracking": lambda t, key, value: t.put(
        key, "logging.report_to", ["wandb"] if value else []
    ),
    "exp_name": Becomes("logging.wandb_run_name"),
    "checkpointing_steps": _checkpointing_steps,
    "keep_last_n_checkpoints": use_kept_checkpoints,
    "clip_grad_norm": _clipping,
    "reduce_loss": Ours("a step's loss is over the tokens of all processes"),
}


def _note_what_is_trained(translation: Translation) -> None:
    """TRL's default depends on the rows, which are not read here."""
    is_said = any(translation.get(key) for key in ("assistant_only_loss", "completion_only_loss"))
    if translation.stage == "sft" and not is_said and not translation.has("loss"):
        translation.notes.append(
            "assistant_only_loss is false: of conversations TRL then trains all tokens, and here "
            "only answers are trained, as of a prompt with a completion; --set loss.name=sft "
            "trains all tokens"
        )


def finish_shared(translation: Translation) -> None:
    """What follows from several keys, of TRL and of systems whose keys are like its."""
    if translation.stage == "sft":
        translation.settings.setdefault("sft", {})
    elif translation.stage == "dpo":
        translation.settings.setdefault("dpo", {})
    if translation.get("use_peft"):
        translation.put("lora_dropout", "lora.dropout", 0.05)
        if translation.get("lora_target_modules") is None:
            translation.tell(
                "lora_target_modules",
                "all linear layers but the output; peft takes fewer of some models (of a Llama "
                "q_proj and v_proj): --set lora.target_modules=[q_proj,v_proj]",
            )
    under_zero = str(translation.settings.get("distributed", {}).get("strategy")).startswith("zero")
    model = translation.settings.get("model", {})
    if model.get("dtype") == "bfloat16" and not under_zero:
        del model["dtype"]
        translation.tell(
            "dtype", "float32 weights, computed in bf16: slow averages stand still else"
        )


def finish(translation: Translation) -> None:
    if not _is_open_instruct(translation):
        _note_what_is_trained(translation)
    finish_shared(translation)
