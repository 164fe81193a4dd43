"""What settings of other trainers (TRL, transformers, axolotl) are called here.

By the last part of their name: the path of ours, or, where there is no single one, a sentence that
says what to do instead. A path is offered where the stage at hand has it.
"""

_SPLIT = "`entrypoint split` makes the rows to evaluate on; name them in evaluation.datasets"
_BATCH = "set training.effective_batch_size: accumulation follows from it"

OTHER_NAMES: dict[str, str] = {
    # models
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "tokenizer_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "flash_attention": "model.attn_implementation",
    "lora_r": "lora.rank",
    "r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    # data
    "type": "format",
    "dataset_name": "hub",
    "dataset_prepared_path": "data.cache_dir",
    "max_length": "sft.max_seq_length",
    "sequence_len": "sft.max_seq_length",
    "sample_packing": "sft.packing",
    "completion_only_loss": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "train_on_inputs": "loss.prompt_loss_weight",
    "val_set_size": _SPLIT,
    "eval_size": _SPLIT,
    "eval_set_size": _SPLIT,
    "test_size": _SPLIT,
    # training
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.effective_batch_size",
    "gradient_accumulation_steps": _BATCH,
    "optim": "training.optimizer",
    "optim_args": "training.optimizer_args",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "bf16": "training.mixed_precision",
    "fp16": "training.mixed_precision",
    "deepspeed": "distributed.strategy",
    "fsdp": "distributed.strategy",
    "output_dir": "run_dir",
    "evals_per_epoch": "evaluation.eval_steps",
    "saves_per_epoch": "checkpointing.save_steps",
    # sampling
    "num_samples": "sampling.n",
    "num_generations": "sampling.n",
    "num_return_sequences": "sampling.n",
    "max_new_tokens": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
}
