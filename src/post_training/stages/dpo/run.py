"""Prepare the pairs, find the reference's logprobs, train, write `RUN/model`.

RUN/data/          token ids, figures and rows (data/pairs/dataset.py)
RUN/reference/     logprobs of the reference, where they were computed here (reference.py)
RUN/evaluation/, RUN/evaluation_reference/   the same of the evaluation's pairs
and what `entrypoint sft` leaves: checkpoints/, metrics.jsonl, model/, …
"""

import os

from post_training.data.config import DataConfig, PairConfig
from post_training.models.quiet import quiet_libraries
from post_training.stages.context import Result, StageContext
from post_training.stages.dpo.config import DpoConfig
from post_training.stages.leftovers import remove_leftovers


def run(config: DpoConfig, context: StageContext) -> Result:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the reproducible one
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # its backward pass
    quiet_libraries(context.run_dir / "cache")
    from post_training.data.chat.special_tokens import with_special_tokens
    from post_training.data.pairs.dataset import PairDataset
    from post_training.models.load import load_tokenizer
    from post_training.stages.dpo.training import train
    from post_training.stages.pair_data import PairPreparation, num_embedded_ids
    from post_training.stages.training.requirements import check_requirements

    check_requirements(config)
    names = ("data", "reference", "evaluation", "evaluation_reference")
    context.on_writer(lambda: remove_leftovers(context.run_dir, *names))
    tokenizer = with_special_tokens(load_tokenizer(config.model.path), config.data.special_tokens)

    num_ids = num_embedded_ids(config.model.path)

    def pairs(data: DataConfig, limits: PairConfig, name: str) -> PairDataset:
        return PairPreparation(
            context, data, limits, tokenizer, config.seed, name=name, num_ids=num_ids
        ).dataset()

    dataset, evaluation_dataset = pairs(config.data, config.dpo, "data"), None
    if config.evaluation is not None:
        limits = config.dpo.model_copy(update={"packing": "none", "max_seq_length": None})
        evaluation_dataset = pairs(config.evaluation_data(), limits, "evaluation")
    return train(config, context, tokenizer, dataset, evaluation_dataset)
