"""Ask a saved model in plain transformers and in vLLM, greedily: both must give the same text.

    python chat.py MODEL

Both compute in float32 on the CPU. Exit 1 where the texts differ.
"""

import os
import sys

QUESTIONS = [
    "What is the capital of Switzerland?",
    "Tom has 3 apples and buys 4. How many are they?",
]
MOST_TOKENS = 48


def ask_transformers(folder: str) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        found = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        ids = found[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts


def ask_vllm(folder: str) -> list[str]:
    # Before vLLM is imported. In this process, and on whatever cores there are.
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found = engine.chat(chats, SamplingParams(temperature=0, max_tokens=MOST_TOKENS))
    return [each.outputs[0].text for each in found]


if __name__ == "__main__":
    folder = sys.argv[1]
    for question, one, other in zip(
        QUESTIONS, ask_transformers(folder), ask_vllm(folder), strict=True
    ):
        print(f"{question}\n  transformers: {one!r}\n  vLLM:         {other!r}")
        if one != other:
            sys.exit("the two texts differ")
