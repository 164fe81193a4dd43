"""Prepare the data, train, write `RUN/model`.

RUN/data/          token ids, masks and rows (data/prepared/dataset.py)
RUN/evaluation/    the same, of the evaluation's rows
RUN/checkpoints/   checkpoint-N: weights, optimizer, schedule, random states, totals
RUN/inference_checkpoints/   step-N: what RUN/model would be after N steps
RUN/metrics.jsonl  one line each logging_steps, and one each evaluation
RUN/steps.jsonl    one line each step, by which two runs are compared
RUN/model/         the result, loadable by plain transformers
RUN/adapter/       with LoRA: what was trained, which RUN/model has merged into it
"""

import os

from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.leftovers import remove_leftovers
from post_training.stages.sft.config import SftConfig


def run(config: SftConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.models.load import load_tokenizer
    from post_training.stages.prepared_data import DataPreparation
    from post_training.stages.sft.training import train
    from post_training.stages.training.requirements import check_requirements

    check_requirements(config)
    context.on_writer(lambda: remove_leftovers(context.run_dir, "data", "evaluation"))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)
    data = DataPreparation(context, config.data, config.sft, tokenizer, config.seed)
    dataset, evaluation_dataset = data.dataset(), None
    if config.evaluation is not None:
        limits = config.sft.model_copy(update={"packing": "none"})
        evaluation_data = DataPreparation(
            context, config.evaluation_data(), limits, tokenizer, config.seed, "evaluation"
        )
        evaluation_dataset = evaluation_data.dataset()
    return train(config, context, tokenizer, dataset, evaluation_dataset)
