"""SwissAI's Hydra configurations (https://github.com/swiss-ai/posttraining, configs/), with the
words of their command line: `dataset=… model=… trainer=plw accelerate_config=… key=value`."""

from pathlib import Path
from typing import Any

from post_training.core.errors import UsageError
from post_training.importers.deepspeed import DECIDED, use_deepspeed
from post_training.importers.documents import read_document
from post_training.importers.training_arguments import (
    ATTENTION,
    PACKING,
    REMOTE_CODE,
    TRAINING_ARGUMENTS,
    use_batch,
    use_dataset_path,
    use_dtype,
    use_model,
    use_precision,
)
from post_training.importers.translation import (
    Becomes,
    Nothing,
    Ours,
    Table,
    Translation,
    becomes_if_set,
)
from post_training.importers.trl import finish_shared

WHOLE = (
    "training_args.gradient_checkpointing_kwargs",
    "training_args.optim_args",
    "training_args.lr_scheduler_kwargs",
    "hydra",
    "resuming",
    "dataset_args.train_split",
    "dataset_args.eval_split",
    "model_vllm_config",
    "model_generation_config",
    "model_eval_generation_config",
)
_DEVICES = ("offload_optimizer_device", "offload_param_device")
_READ_OF_ZERO = {"zero_stage", *_DEVICES}
_COMPOSED = Ours("it goes with dataset_args")
_FOLDERS = Ours("storage: artifacts/{private,shared,store}, and run_dir or output_base")
_RESUMING = Ours(
    "the same command goes on from the newest checkpoint; a changed setting is refused"
)
_OF_ENGINES = Ours("of generation: `entrypoint generate` has its own configuration")
_LOSSES = {"sigmoid": "dpo", "dpo": "dpo", "dpo_norm": "dpo-norm", "ipo": "ipo", "qrpo": "qrpo"}


def defaults_of(translation: Translation) -> dict[str, Any]:
    """A model of theirs without a template has its tokenizer's."""
    return {"tokenizer_args.chat_template_name": None}


def choose_stage(given: dict[str, Any]) -> str:
    return "dpo" if given.get("training_args.loss_type") is not None else "sft"


def _dataset(translation: Translation, key: str, value: Any) -> None:
    name = value or translation.get("dataset_name")
    if name is None:
        translation.refuse(key, "no dataset is named: give dataset=NAME")
        return
    dataset: dict[str, Any] = {}
    use_dataset_path(translation, key, name, dataset)
    train = translation.get("dataset_args.train_split", {})
    if train.get("name"):
        dataset["split"] = train["name"]
    if not train.get("start") and train.get("end"):
        dataset["max_rows"] = train["end"]
    elif train.get("start"):
        translation.refuse(key, "train_split.start: rows are taken from the first on")
    translation.settings.setdefault("data", {})["datasets"] = [dataset]
    translation.tell(key, f"data.datasets: {name}")
    evaluated = translation.get("dataset_args.eval_split", {})
    held_out = evaluated.get("name")
    if held_out and str(translation.get("training_args.eval_strategy", "no")) != "no":
        rows = {**dataset, "split": held_out}
        rows.pop("max_rows", None)
        if evaluated.get("start"):
            translation.refuse(key, "eval_split.start: rows are taken from the first on")
        elif evaluated.get("end"):
            rows["max_rows"] = evaluated["end"]
        translation.settings.setdefault("evaluation", {})["datasets"] = [rows]


def _accelerate(translation: Translation, key: str, value: Any) -> None:
    """accelerate's file; where it is not here, what its name says."""
    if value is None:
        translation.tell(key, "not set")
        return
    path = Path(value)
    if not path.is_file():
        name = path.stem.removeprefix("ds-")
        if name in ("zero1", "zero2", "zero3", "ddp"):
            translation.put(key, "distributed.strategy", name, "by its name: there is no such file")
        else:
            translation.refuse(key, "no such file, and the name says no strategy")
        return
    try:
        given, _ = read_document(path)
    except UsageError as error:
        translation.refuse(key, str(error))
        return
    if (precision := given.get("mixed_precision")) not in (None, "no"):
        use_precision(translation, key, precision)
    kind = given.get("distributed_type", "MULTI_GPU")
    if kind != "DEEPSPEED":
        strategy = {"MULTI_GPU": "ddp", "NO": "ddp", "FSDP": "fsdp2"}.get(kind)
        if strategy is None:
            translation.refuse(key, f"distributed_type {kind} has no counterpart")
        else:
            translation.put(key, "distributed.strategy", strategy)
        return
    zero = given.get("deepspeed_config", {})
    if (file := zero.get("deepspeed_config_file")) is not None:
        use_deepspeed(translation, key, file)
        return
    for name in sorted(zero.keys() - _READ_OF_ZERO):
        told = f"deepspeed_config.{name}: {zero[name]}"
        if name in DECIDED:
            translation.of_deepspeed.setdefault(str(path), {})[name] = zero[name]
            translation.tell(key, f"{told}: compared with our own settings of it")
        else:
            translation.tell(key, f"{told}: not read: our own settings")
    translation.put(key, "distributed.strategy", f"zero{zero.get('zero_stage', 2)}")
    devices = [str(zero.get(name, "none")) for name in _DEVICES]
    if "nvme" in devices:
        translation.refuse(key, "no counterpart of nvme: offload goes to the CPU's memory")
    elif devices[1] == "cpu":
        translation.put(key, "distributed.offload", "parameters")
    elif devices[0] == "cpu":
        translation.put(key, "distributed.offload", "optimizer")


def _trainer(translation: Translation, key: str, value: Any) -> None:
    if value in ("sft", "plw", "ln-plw", "irl"):
        translation.put(key, "loss.name", value)
    else:
        translation.refuse(key, "must be one of sft, plw, ln-plw, irl")


def _of_plw(path: str) -> Any:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if translation.get("trainer") == "sft" and path.endswith("prompt_loss_weight"):
            translation.tell(key, "of plw, and the trainer is sft")
        else:
            translation.put(key, path, value)

    return handle


def _attention(translation: Translation, key: str, value: Any) -> None:
    if value is not None and str(value) not in ATTENTION:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")
    else:
        translation.put(key, "model.attn_implementation", ATTENTION.get(str(value), "sdpa"))


def _template(translation: Translation, key: str, value: Any) -> None:
    if value is None:
        translation.put(key, "data.chat_template", "model", "the tokenizer's own")
    else:
        translation.put(key, "data.chat_template", value)


def _batch(translation: Translation, key: str, value: Any) -> None:
    """Their global_batch_size is what their launcher came to; it counts where nothing else says."""
    names = (
        "training_args.per_device_train_batch_size",
        "training_args.gradient_accumulation_steps",
    )
    if translation.num_processes is None and value:
        translation.put(
            names[0], "training.per_device_train_batch_size", translation.get(names[0], 1)
        )
        translation.put(key, "training.effective_batch_size", value)
        translation.tell(names[1], "part of training.effective_batch_size")
    else:
        translation.tell(key, "the number of processes says it")
        use_batch(translation, *names)


def _job_folder(translation: Translation, key: str, value: Any) -> None:
    stage = "train_sft" if translation.stage == "sft" else "train_preference"
    subdir = translation.get("artifacts_subdir", "private")
    translation.put(key, "output_base", f"artifacts/{subdir}/outputs/{stage}/{value}")


def _pair_loss(translation: Translation, key: str, value: Any) -> None:
    if value in _LOSSES:
        translation.put(key, "loss.name", _LOSSES[value])
    else:
        translation.refuse(key, f"must be one of {', '.join(_LOSSES)}")


def _stored(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "reference.logprobs", "stored" if value else "auto")


def _pair_total(translation: Translation, key: str, value: Any) -> None:
    parts = [
        translation.get(f"training_args.max_{name}_length") for name in ("prompt", "completion")
    ]
    if None not in parts:
        translation.tell(key, "the limits of prompt and completion hold, each by itself")
    else:
        translation.refuse(key, "set max_prompt_length and max_completion_length")


def _wandb(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "logging.wandb_project", value)


_ARGUMENTS = {
    f"training_args.{name}": rule
    for name, rule in TRAINING_ARGUMENTS.items()
    if name not in ("per_device_train_batch_size", "gradient_accumulation_steps")
}
_BY_BATCH = Ours("training.effective_batch_size")
TABLE: Table = {
    **_ARGUMENTS,
    "model_args.model_name_or_path": use_model,
    "model_args.torch_dtype": use_dtype,
    "model_args.attn_implementation": _attention,
    "model_args.trust_remote_code": REMOTE_CODE,
    "model_args.use_peft": Nothing("set lora by --set lora.rank=16"),
    "tokenizer_args.tokenizer_name_or_path": use_model,
    "tokenizer_args.chat_template_name": _template,
    "tokenizer_args.trust_remote_code": REMOTE_CODE,
    "tokenizer_args.padding_side": Ours("padding is never trained, whatever its side"),
    "tokenizer_args.add_bos_to_chat_template": Ours("a text begins with BOS where the model's do"),
    "tokenizer_args.model_pad_token_id": Ours("padding is never trained nor attended"),
    "tokenizer_args.pad_token_id": Ours("padding is never trained nor attended"),
    "tokenizer_args.model_eos_token_id": Nothing("set data.special_tokens.eos_token, by its text"),
    "model_vllm_config": _OF_ENGINES,
    "model_generation_config": _OF_ENGINES,
    "model_eval_generation_config": _OF_ENGINES,
    "dataset_name": _COMPOSED,
    "dataset_args.dataset_name": _dataset,
    "dataset_args.train_split": _COMPOSED,
    "dataset_args.eval_split": _COMPOSED,
    "dataset_args.debug_oom": Becomes("data.debug_oom"),
    "dataset_args.debug_subsample.train": becomes_if_set(
        "data.debug_subsample", "all rows, same here"
    ),
    "dataset_args.debug_subsample.eval": becomes_if_set(
        "evaluation.debug_subsample", "all rows, same here"
    ),
    "dataset_args.shuffle": Becomes("training.shuffle"),
    "script_args.dataset_name": _COMPOSED,
    "script_args.dataset_train_split": _COMPOSED,
    "script_args.dataset_test_split": _COMPOSED,
    "accelerate_config": _accelerate,
    "trainer": _trainer,
    "plw_args.prompt_loss_weight": _of_plw("loss.prompt_loss_weight"),
    "plw_args.sequence_level_loss": _of_plw("loss.sequence_level_loss"),
    "irl_args.irl_lambda": Becomes("loss.irl_lambda"),
    "irl_args.irl_gamma": Becomes("loss.irl_gamma"),
    "global_batch_size": _batch,
    "num_nodes": Ours("of the job: post-training submit --nodes"),
    "training_args.per_device_train_batch_size": _BY_BATCH,
    "training_args.gradient_accumulation_steps": _BY_BATCH,
    "training_args.max_seq_length": Becomes("sft.max_seq_length"),
    "training_args.packing": Becomes("sft.packing", PACKING),
    "training_args.dataset_num_proc": Becomes("data.num_workers"),
    "training_args.max_prompt_length": Becomes("dpo.max_prompt_length"),
    "training_args.max_completion_length": Becomes("dpo.max_completion_length"),
    "training_args.max_length": _pair_total,
    "training_args.num_ref_rewards": Becomes("dpo.num_ref_rewards"),
    "training_args.loss_type": _pair_loss,
    "training_args.beta": Becomes("loss.beta"),
    "training_args.normalize_beta_by_length": Becomes("loss.normalize_beta_by_length"),
    "training_args.normalize_loss_by_length": Becomes("loss.normalize_loss_by_length"),
    "training_args.precompute_ref_log_probs": Ours(
        "computed before training where none are stored"
    ),
    "training_args.ref_logprobs_from_dataset": _stored,
    "seed": Becomes("seed"),
    "training_args.seed": Ours("one seed is for all"),
    "cuda_deterministic": Ours("the same image and hardware give the same bits"),
    "cuda_strong_deterministic": Ours("the same image and hardware give the same bits"),
    "artifacts_dir": _FOLDERS,
    "artifacts_subdir": _FOLDERS,
    "job_subdir": _job_folder,
    "run_dir": _FOLDERS,
    "resuming_dir": _RESUMING,
    "resuming_hash": _RESUMING,
    "resuming": _RESUMING,
    "hydra": _FOLDERS,
    "preset": Ours("one of their groups, and it is read"),
    "is_this_key_overridden": Ours("an example of theirs"),
    "wandb.project": _wandb,
    "wandb.run_name": Becomes("logging.wandb_run_name"),
    "wandb.tags": Becomes("logging.wandb_tags"),
    "wandb.entity": Becomes("logging.wandb_entity"),
    "wandb.run_id": Ours("the run's own id"),
    "wandb.mode": Ours("the variable WANDB_MODE says it"),
    "wandb.anonymous": Ours("without a key, W&B is offline"),
    "wandb.global_dir": Ours("RUN/wandb"),
    "wandb.use_global_dir": Ours("RUN/wandb"),
}


def finish(translation: Translation) -> None:
    if translation.stage == "dpo" and not translation.get("training_args.normalize_loss_by_length"):
        translation.settings.setdefault("loss", {}).pop("normalize_loss_by_length", None)
    if not translation.has("training.effective_batch_size"):
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        use_batch(translation, *(f"training_args.{name}" for name in names))
    finish_shared(translation)
