"""What the runs work on: a model folder, a prepared dataset, and what the machine can do."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training_runs import Counts


def make_model(folder: Path, corpus: Path, shape: dict[str, int]) -> Path:
    """By `init-model`: a Llama in float32, and a tokenizer of the corpus. Its folder."""
    from post_training.stages.config import InitModelConfig
    from post_training.stages.context import StageContext
    from post_training.stages.init_model import run

    folder.mkdir(parents=True)
    config = InitModelConfig(architecture="llama", corpus=[corpus], **shape)
    run(config, StageContext(folder))
    return folder / "model"


def make_model_on_device(folder: Path, corpus: Path, shape: dict[str, int]) -> Path:
    """A Llama in bfloat16, whose weights are drawn where they are fast to draw. Its folder."""
    from post_training.models.quiet import quiet_libraries

    quiet_libraries(folder / "cache")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from post_training.data.chat.templates import MARKERS, template_text
    from post_training.data.sources.open import read_objects
    from post_training.models.save import save_model_folder, train_tokenizer

    folder.mkdir(parents=True)
    texts = (text for row in read_objects(corpus) for text in row.values())
    template = template_text("chatml")
    tokenizer = train_tokenizer(texts, shape["vocab_size"], MARKERS["chatml"], template)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    save_model_folder(folder / "model", model, tokenizer)
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


def abilities() -> dict[str, Any]:
    """gpu: its name, or None. attention: the best that packed rows can have. liger: whether its
    kernels are there."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "attention": "sdpa", "liger": False}
    return {
        "gpu": torch.cuda.get_device_name(),
        "attention": "flash_attention_2" if find_spec("flash_attn") else "varlen",
        "liger": find_spec("liger_kernel") is not None,
    }


def utilisation(model: Path, counts: Counts, seconds: float) -> float | None:
    """MFU, as our runs record it: model FLOPs a second by the device's peak; None if unknown."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from post_training.train.throughput import model_flops, peak_flops_per_s

    with torch.device("meta"):
        flops = model_flops(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops_per_s(device, torch.bfloat16)
    if flops is None or peak is None:
        return None
    needed = flops.of_step(counts.tokens, counts.trained_tokens, counts.squared_lengths)
    return needed / seconds / peak
