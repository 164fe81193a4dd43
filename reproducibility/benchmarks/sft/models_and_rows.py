"""What the runs work on: a model folder and a prepared dataset."""

from pathlib import Path
from typing import Any

# A Llama of 14 million parameters between the embeddings: a step is matrix products, not Python.
SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
}


def make_model(folder: Path, corpus: Path, shape: dict[str, int]) -> Path:
    """By `init-model`: a Llama in float32, and a tokenizer of the corpus. Its folder."""
    from post_training.stages.config import InitModelConfig
    from post_training.stages.context import StageContext
    from post_training.stages.init_model import run

    folder.mkdir(parents=True)
    config = InitModelConfig(architecture="llama", corpus=[corpus], **shape)
    run(config, StageContext(folder))
    return folder / "model"


def prepare(folder: Path, corpus: Path, model: Path, sequences: dict[str, Any]) -> Path:
    """By `prepare`: questions as prompts, answers as completions. The dataset's folder."""
    from post_training.stages.config import PrepareConfig
    from post_training.stages.context import StageContext
    from post_training.stages.prepare import run

    folder.mkdir(parents=True)
    source = {"path": corpus, "columns": {"prompt": "question", "completion": "answer"}}
    data = {"chat_template": "chatml", "datasets": [source]}
    config = PrepareConfig.model_validate({"tokenizer": model, "data": data, "sft": sequences})
    run(config, StageContext(folder, input_fingerprints={"data.datasets[0].path": ""}))
    return folder / "dataset"
