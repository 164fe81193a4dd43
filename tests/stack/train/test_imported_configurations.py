"""What the importer makes of each system's configuration trains: on a tiny model, two steps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.imported_configurations import CASES, FILES
from helpers.stage_process import start_entrypoint
from helpers.tokenize_runs import document, tokenize, write_lines
from post_training.core import yaml
from post_training.importers.run import import_settings

# Of the size of the machine at hand: what these settings are is not what is tested.
SMALL = [
    "run_dir=run",
    "num_threads=1",
    "num_processes=1",
    "training.max_steps=2",
    "training.num_train_epochs=null",
    "training.effective_batch_size=4",
    "training.per_device_train_batch_size=2",
    "logging.report_to=[]",
]
SHORT = {
    "sft": ["sft.max_seq_length=96"],
    "dpo": ["dpo.max_prompt_length=48", "dpo.max_completion_length=48"],
    "reward-model": ["pairs.max_prompt_length=48", "pairs.max_completion_length=48"],
}
# Where a file names the length in two places, or a token that the tiny model has not.
ALSO = {
    "axolotl": ["training.pad_to_multiple_of=96"],
    "trl": ["data.special_tokens={}"],
    "openeurollm-dpo": ["training.use_liger_kernel=false"],
    "swissai-preference": ["dpo.num_ref_rewards=2"],
}


@pytest.fixture(scope="module")
def rows(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the data that the configurations name."""
    folder = tmp_path_factory.mktemp("rows")
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    pairs: list[dict[str, Any]] = []
    turns = []
    for number in range(16):
        said = [("user", f"What is {number}?"), ("assistant", f"It is {number}" + "!" * number)]
        turns.append(said)
        figures = {"ref_rewards": [0.1, 0.5], "chosen_reward": 0.6, "rejected_reward": 0.2}
        pairs.append({"prompt": said[0][1], "chosen": said[1][1], "rejected": "No.", **figures})
    as_messages = [[{"role": role, "content": text} for role, text in said] for said in turns]
    of_share = {"user": "human", "assistant": "gpt"}
    as_shares = [[{"from": of_share[role], "value": text} for role, text in said] for said in turns]
    write_lines(folder / "chats.jsonl", *({"messages": each} for each in as_messages))
    write_lines(folder / "conversations.jsonl", *({"conversations": each} for each in as_shares))
    write_lines(folder / "pretrain.jsonl", *({"text": said[1][1]} for said in turns))
    write_lines(folder / "pairs.jsonl", *pairs)
    data = folder / "llamafactory/data"
    write_lines(data / "long.jsonl", *({"conversations": each} for each in as_shares))
    alpaca = [{"instruction": said[0][1], "input": "", "output": said[1][1]} for said in turns]
    (data / "alpaca.json").write_text(json.dumps(alpaca))
    ranked = [{**row, "chosen": row["output"], "rejected": "No."} for row in alpaca]
    (data / "preferences.json").write_text(json.dumps(ranked))
    tokenize(
        folder / "tokenize",
        inputs=[
            write_lines(
                folder / "documents.jsonl",
                *({"text": document(said[0][1], said[1][1])} for said in turns),
            )
        ],
        tokenizer=model,
        control_tokens={"user": 3, "assistant": 4},
        eod="</s>",
        output_prefix="sft",
    )
    for path in (folder / "tokenize/dataset").glob("sft_*"):
        shutil.copy(path, folder)
    (folder / "model").symlink_to(model)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_imported_configuration_trains(
    name: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "work"
    shutil.copytree(rows, folder, symlinks=True)
    monkeypatch.chdir(folder)
    case = CASES[name]
    overrides = [*case.overrides, *SMALL, *SHORT[import_settings(case).stage]]
    imported = import_settings(replace(case, overrides=[*overrides, *ALSO.get(name, [])]))
    (folder / "ours.yaml").write_text(yaml.dump(imported.settings))
    process = start_entrypoint(
        [imported.stage, "ours.yaml", "--unpinned"], tmp_path / "log", folder=folder
    )
    process.join(600)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert (folder / "run/model/model.safetensors").exists()
