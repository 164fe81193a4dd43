"""The language model in a folder of more than text: Gemma 3, Mistral Small 3.1, Apertus 1.5.

Only text is trained here, so only the language model is read, as a model of its own. What else the
folder holds is left out, and kept (left_out.py), and what is saved has the folder's layout again.
Where transformers itself finds the language model (Qwen3.5, Llama 4), it is left to do so.

Apertus 1.5 is not in transformers 5.19. What is public of it: the trunk is that of Apertus, the
embedding has ids of images and sound too (266,752), and the output layer those of text alone
(131,072: `output_vocab_size`). The two classes here are that, and go once transformers has its own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, no_type_check

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    ApertusConfig,
    ApertusForCausalLM,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

_APERTUS = "apertus1p5"
# From names in the folder to those of the language model alone.
NAMES_IN_FOLDERS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}


# Its __init__ is transformers', and takes more than its signature says.
@no_type_check
class Apertus1p5TextConfig(ApertusConfig):
    """output_vocab_size: ids that the output layer gives, 0 … output_vocab_size − 1; None: all."""

    model_type = "apertus1p5_text"

    output_vocab_size: int | None = None


class Apertus1p5TextModel(ApertusForCausalLM):
    """Logits are of the output layer's ids alone."""

    config_class = Apertus1p5TextConfig

    def __init__(self, config: Apertus1p5TextConfig):
        super().__init__(config)
        if config.output_vocab_size is not None:
            size = config.hidden_size, config.output_vocab_size
            self.lm_head = torch.nn.Linear(*size, bias=False)
            self.post_init()


@dataclass(frozen=True)
class TextPart:
    """config: of the language model. model_class: whose from_pretrained reads it."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]


def find_text_part(path: Path, settings: dict[str, Any]) -> TextPart | None:
    """None where the folder is of a text model, or transformers finds the language model itself.

    settings: config.json. Errors: those of transformers, for a folder that it can't read.
    """
    model_type = settings.get("model_type")
    if model_type in (_APERTUS, Apertus1p5TextConfig.model_type):
        of_text = settings.get("text_config", settings)
        return TextPart(Apertus1p5TextConfig.from_dict(of_text), Apertus1p5TextModel)
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config()
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is text_class:
        return None
    text.tie_word_embeddings = config.tie_word_embeddings  # the folder's own says it for both
    return TextPart(text, text_class)


def forget_names_in_folder(model: PreTrainedModel) -> None:
    """Let the model be saved under its own names: transformers would go back to the folder's, which
    a checkpoint can't be read by."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        each
        for each in conversions
        if not set(each._original_source_patterns) & NAMES_IN_FOLDERS.keys()
    ]
