"""OpenEuroLLM's YAML (https://github.com/OpenEuroLLM/post-training, configs/trl)."""

from typing import Any

from post_training.importers.axolotl import use_bf16_under_zero
from post_training.importers.deepspeed import use_deepspeed
from post_training.importers.training_arguments import (
    ATTENTION,
    PACKING,
    TRAINING_ARGUMENTS,
    tell_dataset,
    use_dataset_path,
    use_model,
    use_precision,
    use_revision,
)
from post_training.importers.translation import Becomes, Handler, Nothing, Ours, Table, Translation
from post_training.importers.trl import LOSSES

WHOLE = (
    "training.lr_scheduler_kwargs",
    "training.gradient_checkpointing_kwargs",
    "training.liger_kernel_config",
    "training.fsdp_config",
    "deepspeed",
    "llamafactory",
)
# Of their src/post_training/config.py, where we would do otherwise.
_DEFAULTS: dict[str, Any] = {
    "model.attn_implementation": "flash_attention_3",
    "model.dtype": "bfloat16",
    "training.learning_rate": 2e-5,
    "training.effective_batch_size": 512,
    "training.per_device_train_batch_size": 4,
    "training.lr_scheduler_type": "cosine_with_min_lr",
    "training.gradient_checkpointing": True,
    "training.use_liger_kernel": True,
    "training.seed": 42,
    "checkpointing.inference_checkpoint_steps": 200,
    "accelerate.mixed_precision": "bf16",
    "accelerate.dynamo_backend": "inductor",
    "logging.report_to": ["wandb", "tensorboard"],
    "logging.logging_steps": 1,
    "paths.output_base": "outputs",
}
_DEFAULTS_OF_SFT = {"sft.max_seq_length": 4096, "sft.packing": True}
_DEFAULTS_OF_DPO = {"dpo.beta": 5.0, "dpo.loss_type": "sigmoid", "dpo.max_seq_length": 2048}
# By their registry's names. Its olmo3 is that of Olmo 3 Think, which is none of ours.
_TEMPLATES = {
    "chatml": "chatml",
    "tulu": "tulu",
    "tulu3": "tulu",
    "zephyr": "zephyr",
    "mistral": "mistral",
    "apertus": "apertus",
    "olmo3-instruct-sft": "olmo3",
}
_OF_THE_JOB = {
    "slurm.partition": "--partition",
    "slurm.num_nodes": "--nodes",
    "slurm.wall_time": "--time",
    "slurm.account": "--account",
    "slurm.max_failures": "--max-failures",
}
_LAUNCH = Ours("Slurm starts the processes, and they find each other by its variables")
_CONTAINER = Ours("an EDF names the image and its mounts; `post-training edf render` writes it")
_SITE = Ours("the site's file says it; your own settings are in ~/.config/post-training/sites.yaml")


def defaults_of(translation: Translation) -> dict[str, Any]:
    return _DEFAULTS | (_DEFAULTS_OF_DPO if translation.stage == "dpo" else _DEFAULTS_OF_SFT)


def choose_stage(given: dict[str, Any]) -> str:
    return "dpo" if given.get("method") == "dpo" else "sft"


def _job(translation: Translation, key: str, value: Any) -> None:
    translation.tell(key, f"of the job: post-training submit … {_OF_THE_JOB[key]} {value}")


def _datasets(translation: Translation, key: str, value: Any) -> None:
    found = []
    for index, given in enumerate(value or []):
        place, dataset = f"{key}[{index}]", {}
        use_dataset_path(translation, place, given["path"], dataset)
        for name, setting in given.items():
            if setting is None or name == "path":
                continue
            if name == "weight":
                _amount(translation, place, float(setting), dataset)
            elif name in ("name", "subset", "split", "transform"):
                dataset[name] = setting
            else:
                translation.refuse(place, f"{name}: {setting}: not known here")
        if "hub" in dataset:
            dataset.setdefault("split", "train")
        is_file = "path" in dataset and "." in str(dataset["path"]).rsplit("/", 1)[-1]
        if is_file and dataset.pop("split", None):
            translation.tell(f"{place}.split", "a file has one split, and no name for it")
        if "transform" in dataset:
            translation.hints.append(
                f"data.transforms: name the Python file that registers {dataset['transform']}"
            )
        found.append(dataset)
        tell_dataset(translation, place, given, dataset)
    translation.settings.setdefault("data", {})["datasets"] = found
    translation.tell(key, f"data.datasets: {len(found)}")


def _amount(translation: Translation, place: str, weight: float, dataset: dict[str, Any]) -> None:
    """Their weight is of the dataset itself: 0.5 is half of its rows, 2 is each row twice."""
    if weight < 1:
        dataset["subsample_factor"] = weight
    elif weight > 1:
        dataset["duplication_factor"] = weight
    told = f"{weight:g} times its rows (our `weight` is another thing: a share of the mixture)"
    translation.tell(f"{place}.weight", told)


def _template(translation: Translation, key: str, value: Any) -> None:
    if value in _TEMPLATES or str(value).endswith(".jinja"):
        translation.put(key, "data.chat_template", _TEMPLATES.get(value, value))
    else:
        translation.refuse(
            key,
            f"it is in their registry: {', '.join(_TEMPLATES)} are in both; else give a .jinja "
            f"file, or model, by --set data.chat_template=…, and --drop {key}",
        )


def _attention(translation: Translation, key: str, value: Any) -> None:
    if value in ATTENTION:
        translation.put(
            key, "model.attn_implementation", ATTENTION[value], "FlashAttention on GPUs"
        )
    else:
        translation.refuse(key, f"must be one of {', '.join(ATTENTION)}")


def _method(translation: Translation, key: str, value: Any) -> None:
    if value in ("sft", "dpo"):
        translation.tell(key, f"the stage: entrypoint {value}")
    else:
        translation.refuse(key, "must be sft or dpo")


def _backend(translation: Translation, key: str, value: Any) -> None:
    if value == "trl":
        translation.tell(key, "there is one trainer here")
    else:
        translation.refuse(key, "put its block into a file: post-training import llamafactory FILE")


def _dtype(translation: Translation, key: str, value: Any) -> None:
    if value != "bfloat16":
        translation.tell(key, "float32, same here")
    elif translation.get("deepspeed"):
        translation.put(key, "model.dtype", "bfloat16", "DeepSpeed keeps float32 copies")
    else:
        translation.tell(key, "float32 weights, computed in bf16: slow averages stand still else")


def _of_sft(translation: Translation, key: str, value: Any) -> None:
    if translation.stage != "sft":
        translation.tell(key, f"of sft, and the method is {translation.stage}")
    else:
        translation.put(key, key, PACKING(value) if key == "sft.packing" else value)


def _of_dpo(rule: Handler) -> Handler:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if translation.stage != "dpo":
            translation.tell(key, f"of dpo, and the method is {translation.stage}")
        else:
            rule(translation, key, value)

    return handle


def _becomes(path: str) -> Handler:
    def handle(translation: Translation, key: str, value: Any) -> None:
        if value is None:
            translation.tell(key, "not set")
        else:
            translation.put(key, path, value)

    return handle


def _pair_length(translation: Translation, key: str, value: Any) -> None:
    two = "dpo.max_prompt_length and dpo.max_completion_length"
    if key not in translation.where:
        translation.tell(key, f"no limit here: {two} set one")
    else:
        translation.refuse(
            key,
            f"a pair is cut by {two}: set the two by --set (together {value}), and --drop {key}",
        )


def _pair_loss(translation: Translation, key: str, value: Any) -> None:
    try:
        translation.put(key, "loss.name", LOSSES(value))
    except ValueError as error:
        translation.refuse(key, str(error))


def _run_name(translation: Translation, key: str, value: Any) -> None:
    if value is None:
        translation.tell(key, "no setting needed: made of the stage, the model and the data")
        return
    base = translation.get("paths.output_base", "outputs")
    translation.put(key, "run_dir", f"{base}/{value}")


def _dynamo(translation: Translation, key: str, value: Any) -> None:
    translation.put(key, "training.torch_compile", str(value) == "inductor")


_ARGUMENTS = {
    f"training.{name}": rule
    for name, rule in TRAINING_ARGUMENTS.items()
    if name not in ("per_device_train_batch_size", "gradient_accumulation_steps")
}
TABLE: Table = {
    **_ARGUMENTS,
    "method": _method,
    "backend": _backend,
    "run_name": _run_name,
    "offline": Ours("a run never uses the network; W&B is online where there is a key"),
    "llamafactory": Nothing("put it into a file: post-training import llamafactory FILE"),
    "model.name_or_path": use_model,
    "model.attn_implementation": _attention,
    "model.dtype": _dtype,
    "model.revision": use_revision("model.name_or_path"),
    "training.effective_batch_size": Becomes("training.effective_batch_size"),
    "training.per_device_train_batch_size": Becomes("training.per_device_train_batch_size"),
    "training.num_training_samples": Becomes("training.num_training_samples"),
    "training.num_training_tokens": Becomes("training.num_training_tokens"),
    "training.lr_scheduler_kwargs": Becomes("training.lr_scheduler_kwargs"),
    "sft.max_seq_length": _of_sft,
    "sft.packing": _of_sft,
    "sft.dataset_num_proc": Becomes("data.num_workers"),
    "dpo.dataset_num_proc": Becomes("data.num_workers"),
    "checkpointing.save_strategy": TRAINING_ARGUMENTS["save_strategy"],
    "prefetch_assets": Ours("`post-training model fetch` and `data fetch` do it before a run"),
    "container.path": _CONTAINER,
    **dict.fromkeys(("slurm.qos", "slurm.mem", "slurm.modules", "slurm.module_purge"), _SITE),
    "dpo.beta": _of_dpo(_becomes("loss.beta")),
    "dpo.loss_type": _of_dpo(_pair_loss),
    "dpo.ref_model_name_or_path": _of_dpo(_becomes("reference.ref_model_name_or_path")),
    "dpo.max_seq_length": _of_dpo(_pair_length),
    "checkpointing.save_steps": Becomes("checkpointing.save_steps"),
    "checkpointing.save_total_limit": Becomes("checkpointing.save_total_limit"),
    "checkpointing.inference_checkpoint_steps": Becomes("checkpointing.inference_checkpoint_steps"),
    "checkpointing.inference_checkpoint_path": Ours(
        "RUN/inference_checkpoints", ("inference_checkpoints",)
    ),
    "data.chat_template": _template,
    "data.num_proc": Becomes("data.num_workers"),
    "data.seed": Ours("one seed is for all that is random"),
    "data.datasets": _datasets,
    "deepspeed": use_deepspeed,
    "deepspeed.config_path": use_deepspeed,
    "accelerate.mixed_precision": use_precision,
    "accelerate.dynamo_backend": _dynamo,
    "accelerate.use_deepspeed": Ours("distributed.strategy says it"),
    "accelerate.deepspeed_multinode_launcher": _LAUNCH,
    "accelerate.same_network": _LAUNCH,
    "accelerate.rdzv_backend": _LAUNCH,
    "logging.report_to": TRAINING_ARGUMENTS["report_to"],
    "logging.wandb_project": Becomes("logging.wandb_project"),
    "logging.logging_steps": Becomes("logging.logging_steps"),
    "logging.include_num_input_tokens_seen": TRAINING_ARGUMENTS["include_num_input_tokens_seen"],
    "slurm.job_name": Ours("the job is named for the stage and the run folder"),
    "slurm.gpus_per_node": _SITE,
    "slurm.cpus_per_gpu": _SITE,
    "slurm.cpus_per_task": _SITE,
    "slurm.signal_time_seconds": _SITE,
    **dict.fromkeys(_OF_THE_JOB, _job),
    "container": _CONTAINER,
    "container.image": _CONTAINER,
    "container.bind_mounts": _CONTAINER,
    "container.env_file": _CONTAINER,
    "debug.enabled": Becomes("debug.enabled"),
    "debug.override_existing": Becomes("debug.override_existing"),
    "paths.output_base": Becomes("output_base"),
    "paths.debug_base": Ours("trials are in the folder debug of output_base"),
}


def finish(translation: Translation) -> None:
    if translation.stage == "dpo":
        translation.settings.setdefault("dpo", {})
    use_bf16_under_zero(translation)
