"""The smallest job: a model of random weights learns to double numbers."""

import json
from pathlib import Path

INIT = """
architecture: llama
hidden_size: 32
num_hidden_layers: 1
num_attention_heads: 2
num_key_value_heads: 2
intermediate_size: 64
max_position_embeddings: 128
vocab_size: 300
corpus: [sums.jsonl]
run_dir: init
"""
SFT = """
model: {path: init/model}
data:
  chat_template: chatml
  datasets: [{path: sums.jsonl, columns: {prompt: question, completion: answer}}]
training:
  {max_steps: 4, effective_batch_size: 4, per_device_train_batch_size: 2, learning_rate: 1e-3}
sft: {max_seq_length: 64}
logging: {logging_steps: 1}
run_dir: run
"""


def write_sums(folder: Path) -> None:
    """Write the rows, and the configurations of init-model (`init`) and sft (`run`), into it."""
    rows = [{"question": f"{a} + {a}?", "answer": f"{2 * a}"} for a in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "init.yaml").write_text(INIT)
    (folder / "sft.yaml").write_text(SFT)
