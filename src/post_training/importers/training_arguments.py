"""Keys of transformers' TrainingArguments, which TRL, LLaMA-Factory and others take as they are."""

import json
import re
from pathlib import Path
from typing import Any

from post_training.core.errors import shown
from post_training.importers.deepspeed import use_deepspeed
from post_training.importers.fsdp import FSDP
from post_training.importers.translation import Becomes, Nothing, Ours, Table, Translation, choose

OPTIMIZERS = {
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw",
    "adamw": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adam": "adamw",
    # Paging moves the state between memories, and changes no figure.
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_lion_32bit": "lion",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
    "lion_32bit": "lion",
    "lion": "lion",
    "ademamix": "ademamix",
}
ATTENTION = {
    "flash_attention_2": "varlen",
    "flash_attention_3": "varlen",
    "fa2": "varlen",
    "fa3": "varlen",
    "true": "varlen",
    "sdpa": "sdpa",
    "auto": "sdpa",
    "eager": "eager",
    "flex_attention": "flex_attention",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADER = Ours("rows are read from prepared files, without processes of a loader")
_METRICS = Ours("metrics.jsonl has a line each logging_steps, with all tokens counted")
_PUBLISH = Nothing("nothing is sent to a hub; RUN/model is a folder to upload")
_NO_STEPS_OF = "a run that is started again goes on from its newest checkpoint by itself"


def is_hub_name(value: Any) -> bool:
    """Whether it names a model or dataset of the hub, and no folder or file that is here."""
    return isinstance(value, str) and bool(_HUB_NAME.fullmatch(value)) and not Path(value).exists()


def use_length(translation: Translation, key: str, value: Any) -> None:
    """Their limit of a whole sequence. A pair has two limits here, of prompt and of answers."""
    block = "dpo" if translation.stage == "dpo" else "pairs"
    two = f"{block}.max_prompt_length and {block}.max_completion_length"
    if translation.stage == "sft":
        translation.put(key, "sft.max_seq_length", value)
    elif key in translation.where:
        translation.refuse(key, f"a pair is cut by {two}: set the two by --set, and --drop {key}")
    else:
        translation.tell(key, f"no limit here: {two} set one")


def use_model(translation: Translation, key: str, value: Any) -> None:
    """A folder, or a name on the hub."""
    if translation.has("model.path") or translation.has("model.hub"):
        named = translation.settings["model"]
        if value in (None, named.get("path"), named.get("hub")):
            translation.tell(key, "the same as the model")
        else:
            translation.refuse(
                key, f"the tokenizer is read from the model's folder; --drop {key} does so"
            )
    elif value is None:
        translation.tell(key, "not set")
    elif is_hub_name(value):
        translation.put(key, "model.hub", value, "a run downloads nothing")
        translation.hints.append(
            f"`post-training model fetch {value} --hub-dir DIR` prints what to add by --set: "
            "model.revision=… and model.hub_dir=…"
        )
    else:
        translation.put(key, "model.path", value)


def use_revision(model_key: str) -> Any:
    """A rule for the model's commit: of a folder it says nothing, and a branch can change."""

    def handle(translation: Translation, key: str, value: Any) -> None:
        if value is None or not is_hub_name(translation.get(model_key)):
            translation.tell(
                key, "no setting needed: the model is a folder" if value else "not set"
            )
        elif _COMMIT.fullmatch(str(value)):
            translation.put(key, "model.revision", value)
        else:
            translation.tell(key, "a branch, which can change: fetching prints its commit")

    return handle


def use_dataset_path(translation: Translation, key: str, value: str, dataset: dict) -> None:
    """hub or path of one of our datasets."""
    if is_hub_name(value):
        dataset["hub"] = value
        translation.hints.append(
            f"`post-training data fetch {value} --hub-dir DIR` prints the revision: set it, and "
            "data.hub_dir"
        )
    else:
        dataset["path"] = value


def tell_dataset(
    translation: Translation, key: str, given: dict[str, Any], dataset: dict[str, Any]
) -> None:
    """What a dataset of theirs became, whole."""
    theirs = shown(given, limit=None)
    translation.tell(key, f"{theirs} becomes {shown(dataset, limit=None)}")


def use_batch(translation: Translation, micro_key: str, accumulation_key: str) -> None:
    """Rows a step = rows a micro-batch × accumulated steps × processes."""
    micro = translation.get(micro_key, 1)
    accumulated = translation.get(accumulation_key, 1)
    for key, number in ((micro_key, micro), (accumulation_key, accumulated)):
        if not isinstance(number, int):
            translation.refuse(key, "must be an integer")
            return
    translation.put(micro_key, "training.per_device_train_batch_size", micro)
    if translation.num_processes is None:
        translation.refuse(
            accumulation_key if accumulation_key in translation.given else micro_key,
            f"a step has {micro} × {accumulated} × processes rows, and the file does not say how "
            "many processes: give --num-processes (nodes × GPUs of a node)",
        )
        return
    whole = micro * accumulated * translation.num_processes
    note = f"{micro} × {accumulated} × {translation.num_processes} processes"
    translation.put(accumulation_key, "training.effective_batch_size", whole, note)


def use_warmup(translation: Translation, key: str, value: Any) -> None:
    if not value:
        translation.tell(key, "none, same here")
    elif translation.has("training.warmup"):
        translation.refuse(key, "warmup is said twice: keep warmup_steps, which is what counts")
    else:
        translation.put(key, "training.warmup", value)


def use_precision(translation: Translation, key: str, value: Any) -> None:
    name = str(value).lower()
    if name in ("true", "auto", "bf16", "full"):
        translation.put(key, "training.mixed_precision", "bf16")
    elif name in ("false", "no", "none"):
        translation.tell(key, "float32, same here")
    else:
        translation.refuse(key, "only bf16 or no")


def use_pure_bf16(translation: Translation, key: str, value: Any) -> None:
    if value:
        note = "float32 weights: in bfloat16 slow averages stand still"
        translation.put(key, "training.mixed_precision", "bf16", note)
    else:
        translation.tell(key, "off, same here")


def use_dtype(translation: Translation, key: str, value: Any) -> None:
    """bfloat16 where DeepSpeed keeps float32 copies; else float32, computed in bf16."""
    if str(value) not in ("bfloat16", "bf16", "float32", "auto", "None"):
        translation.refuse(key, "must be bfloat16 or float32")
    elif str(value) in ("bfloat16", "bf16"):
        translation.put(key, "model.dtype", "bfloat16")
    else:
        translation.tell(key, "float32, same here")


def use_optimizer(translation: Translation, key: str, value: Any) -> None:
    name = str(value).lower()
    if name not in OPTIMIZERS:
        translation.refuse(
            key,
            f"no counterpart: optimizers are {', '.join(sorted(set(OPTIMIZERS.values())))}, with "
            f"their state in full precision; --drop {key} takes adamw",
        )
    else:
        is_fused = "fused" in str(translation.get("optim_args", ""))
        ours = "adamw" if name == "adamw_torch" and is_fused else OPTIMIZERS[name]
        translation.put(key, "training.optimizer", ours)


def use_optimizer_arguments(translation: Translation, key: str, value: Any) -> None:
    """As a mapping, or as text: "fused=True,eps=1e-8"."""
    if not value:
        translation.tell(key, "none")
        return
    if isinstance(value, str):
        pairs = (item.split("=", 1) for item in re.split(r",(?![^()]*\))", value))
        value = {name.strip(): _number(text.strip()) for name, text in pairs}
    value = dict(value)
    if (fused := value.pop("fused", None)) is not None:
        translation.put(key, "training.optimizer", "adamw" if fused else "adamw_torch", "fused")
    for name, one in value.items():
        put_optimizer_argument(translation, key, name, one)


def put_optimizer_argument(translation: Translation, key: str, name: str, value: Any) -> None:
    """One setting of the optimizer; beta1, beta2 and epsilon by the names they have here."""
    arguments = translation.settings.setdefault("training", {}).setdefault("optimizer_args", {})
    if name in ("beta1", "beta2"):
        betas = arguments.setdefault("betas", [0.9, 0.999])
        betas[name == "beta2"] = value
        translation.tell(key, f"training.optimizer_args.betas: {betas}")
    else:
        ours = {"epsilon": "eps"}.get(name, name)
        translation.put(key, f"training.optimizer_args.{ours}", value)


def use_report_to(translation: Translation, key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value or []
    known = [name for name in names if name in ("wandb", "tensorboard")]
    others = [name for name in names if name not in ("wandb", "tensorboard", "none")]
    if others:
        translation.refuse(key, f"no counterpart of {', '.join(others)}: wandb and tensorboard are")
    else:
        translation.put(key, "logging.report_to", known)


def use_strategy(setting: str, steps: str, whole: str) -> Any:
    """A handler of save_strategy or eval_strategy. steps: our setting. whole: what else happens."""

    def handle(translation: Translation, key: str, value: Any) -> None:
        name = str(value).lower()
        if name in ("no", "steps", "false"):
            translation.tell(key, f"{steps} says it; {whole}")
        elif name == "epoch":
            translation.put(key, setting, 1)
        else:
            translation.refuse(key, "must be no, steps or epoch")

    return handle


def use_kept_checkpoints(translation: Translation, key: str, value: Any) -> None:
    """null keeps all with them, as with us; our own default keeps two."""
    kept = None if value in (None, -1) else value
    translation.put(key, "checkpointing.save_total_limit", kept, "all" if kept is None else "")


def use_resumed(translation: Translation, key: str, value: Any) -> None:
    if value in (None, True, False, "auto", ""):
        translation.tell(key, f"no setting needed: {_NO_STEPS_OF}")
    else:
        translation.refuse(key, f"{_NO_STEPS_OF}; to begin from weights, set model.path")


def use_steps(translation: Translation, key: str, value: Any) -> None:
    if value in (None, -1, 0):
        translation.tell(key, "not set: epochs say the length")
    else:
        translation.settings.setdefault("training", {}).pop("num_train_epochs", None)
        translation.put(key, "training.max_steps", value)


def use_epochs(translation: Translation, key: str, value: Any) -> None:
    if translation.has("training.max_steps"):
        translation.tell(key, "max_steps counts instead")
    else:
        translation.put(key, "training.num_train_epochs", value)


def use_micro_batch(accumulation_key: str) -> Any:
    return lambda translation, key, value: use_batch(translation, key, accumulation_key)


def _follows(translation: Translation, key: str, value: Any) -> None:
    if not translation.has("training.effective_batch_size"):
        translation.tell(key, "part of training.effective_batch_size")


def _whole_loss(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "training.max_grad_norm", value)


def _number(text: str) -> Any:
    try:
        return json.loads(text.lower().replace("(", "[").replace(")", "]"))
    except ValueError:
        return text


UNUSED_PARAMETERS = Ours(
    "each parameter of the models here is used in each step, so none is sought"
)
BY_LENGTH = Nothing(
    "rows are not grouped by length, which would tie the order to the lengths; sft.packing or "
    "training.padding_free leave no padding at all"
)
REENTRANT = Ours("activations are computed again without reentrance, with the same result")
REMOTE_CODE = Ours("no code of a model is run: a folder that needs its own is refused")
QUANTIZED = Nothing("models are trained in 16 or 32 bits")
NEW_TOKENS = Nothing("`entrypoint init-model` makes room for tokens; no run adds any")
PLAIN_LORA = Nothing("lora is the plain one, of linear layers")

TRAINING_ARGUMENTS: Table = {
    "output_dir": Becomes("run_dir"),
    "overwrite_output_dir": Ours("a finished run is never overwritten: give another run_dir"),
    "do_train": Ours("the stage's name says it"),
    "do_eval": Ours("`evaluation` says it"),
    "do_predict": Nothing("`entrypoint generate` does it"),
    "seed": Becomes("seed"),
    "data_seed": Ours("one seed is for all that is random"),
    "learning_rate": Becomes("training.learning_rate", float),
    "weight_decay": Becomes("training.weight_decay"),
    "max_grad_norm": _whole_loss,
    "num_train_epochs": use_epochs,
    "max_steps": use_steps,
    "warmup_ratio": use_warmup,
    "warmup_steps": use_warmup,
    "lr_scheduler_type": Becomes("training.lr_scheduler_type"),
    "lr_scheduler_kwargs": Becomes("training.lr_scheduler_kwargs"),
    "optim": use_optimizer,
    "optim_args": use_optimizer_arguments,
    "adam_beta1": lambda t, key, value: put_optimizer_argument(t, key, "beta1", value),
    "adam_beta2": lambda t, key, value: put_optimizer_argument(t, key, "beta2", value),
    "adam_epsilon": lambda t, key, value: put_optimizer_argument(t, key, "eps", value),
    "per_device_train_batch_size": use_micro_batch("gradient_accumulation_steps"),
    "gradient_accumulation_steps": _follows,
    "gradient_checkpointing": Becomes("training.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": REENTRANT,
    "gradient_checkpointing_kwargs.use_reentrant": REENTRANT,
    "use_reentrant_gc": REENTRANT,
    "bf16": use_precision,
    "fp16": Nothing("bf16 needs no scaling of the loss: training.mixed_precision: bf16"),
    "tf32": Ours("float32 is computed as float32; bf16 is faster still"),
    "bf16_full_eval": Ours("an evaluation computes as training does"),
    "torch_compile": Becomes("training.torch_compile"),
    "use_liger_kernel": Becomes("training.use_liger_kernel"),
    "liger_kernel_config": Ours("norms, rotary embeddings and MLPs; the loss has its own kernel"),
    "logging_steps": Becomes("logging.logging_steps"),
    "logging_strategy": Ours("by steps", ("steps",)),
    "logging_first_step": _METRICS,
    "logging_dir": Ours("RUN/tensorboard and RUN/wandb"),
    "include_num_input_tokens_seen": _METRICS,
    "average_tokens_across_devices": Ours("a step's loss is over the tokens of all processes"),
    "report_to": use_report_to,
    "run_name": Becomes("logging.wandb_run_name"),
    "save_strategy": use_strategy(
        "checkpointing.saves_per_epoch", "checkpointing.save_steps", "there is one at the end"
    ),
    "save_steps": Becomes("checkpointing.save_steps"),
    "save_total_limit": use_kept_checkpoints,
    "save_only_model": Ours(
        "a checkpoint is whole, so that a run can go on; "
        "checkpointing.inference_checkpoint_steps writes models without optimizer"
    ),
    "save_safetensors": Ours("models are safetensors", (True,)),
    "load_best_model_at_end": Nothing("RUN/model is the last; inference checkpoints keep others"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy"),
        use_strategy(
            "evaluation.evals_per_epoch", "evaluation.eval_steps", "there is one at the end"
        ),
    ),
    "eval_on_start": Nothing("there is no evaluation before the first step"),
    "per_device_eval_batch_size": Becomes("evaluation.per_device_eval_batch_size"),
    "eval_steps": Becomes("evaluation.eval_steps"),
    "dataloader_num_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_drop_last": Ours("each step has a whole batch"),
    "remove_unused_columns": Ours("columns that are not read are counted in the report"),
    "group_by_length": BY_LENGTH,
    "ddp_timeout": Ours("Slurm's time limit and the job's own checks end a hung step"),
    "ddp_find_unused_parameters": UNUSED_PARAMETERS,
    "deepspeed": use_deepspeed,
    **FSDP,
    "ddp_backend": Ours("nccl on GPUs, gloo elsewhere"),
    "local_rank": Ours("the launcher says it"),
    "full_determinism": Ours("the same image and hardware give the same bits"),
    "neftune_noise_alpha": Nothing("no noise is added to embeddings"),
    "label_smoothing_factor": Nothing("there is no label smoothing"),
    "resume_from_checkpoint": use_resumed,
    "push_to_hub": _PUBLISH,
    "hub_model_id": _PUBLISH,
    "hub_strategy": _PUBLISH,
    "auto_find_batch_size": Nothing("a step has training.effective_batch_size rows, and no fewer"),
    "ignore_data_skip": Nothing("a run that goes on has the rows that come next"),
    "optim_target_modules": Nothing("every parameter has the same optimizer"),
    "metric_for_best_model": Ours("it goes with load_best_model_at_end"),
    "greater_is_better": Ours("it goes with load_best_model_at_end"),
    "torch_compile_backend": Ours("inductor", ("inductor",)),
    "torch_compile_mode": Ours("torch's default", ("default",)),
    "torch_empty_cache_steps": Ours("what the GPU keeps changes no result"),
    "eval_accumulation_steps": Ours("an evaluation keeps sums, and no logits"),
    "prediction_loss_only": Ours("an evaluation keeps sums, and no logits"),
    "eval_delay": Nothing("evaluations begin with the first interval"),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
        Ours("it goes with push_to_hub"),
    ),
    **dict.fromkeys(
        (
            *("log_level", "log_level_replica", "log_on_each_node", "logging_nan_inf_filter"),
            *("skip_memory_metrics", "include_tokens_per_second", "debug"),
        ),
        _METRICS,
    ),
    **dict.fromkeys(
        ("ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        Ours("how gradients travel changes no result"),
    ),
    "disable_tqdm": Ours("progress is shown only on a terminal"),
    "plot_loss": Ours("metrics.jsonl and TensorBoard have the curve"),
}
DTYPE = choose(bfloat16="bfloat16", bf16="bfloat16", float32="float32", fp32="float32")
PACKING = choose(true="bfd", false="none", none="none", bfd="bfd", ffd="bfd", wrapped="next_fit")
