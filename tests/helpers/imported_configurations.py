"""A configuration of each of the other systems, with the keys of a public one."""

from pathlib import Path

from post_training.importers.run import Request

FILES = Path(__file__).parents[1] / "unit/importers/files"
# A configuration of each system: its files and command line, and what else is to be said.
CASES: dict[str, Request] = {
    "axolotl": Request("axolotl", ["axolotl.yaml"], num_processes=4),
    "axolotl-dpo": Request(
        "axolotl",
        ["axolotl-dpo.yaml"],
        drop=["sequence_len"],
        overrides=["dpo.max_prompt_length=1024", "dpo.max_completion_length=1024"],
        num_processes=4,
    ),
    "trl": Request("trl", ["trl-sft.yaml"], num_processes=2),
    "trl-mixture": Request("trl", ["trl-mixture.yaml"], num_processes=2),
    "open-instruct": Request("trl", ["open-instruct.yaml"], num_processes=2),
    "openeurollm": Request("openeurollm", ["openeurollm-sft.yaml", "training.max_steps=20"]),
    "openeurollm-dpo": Request(
        "openeurollm",
        ["openeurollm-dpo.yaml"],
        drop=["dpo.max_seq_length"],
        overrides=["dpo.max_prompt_length=1024", "dpo.max_completion_length=1024"],
    ),
    "swissai": Request(
        "swissai",
        ["swissai/train-sft.yaml", "model=apertus-8b", "trainer=ln-plw", "job_subdir=try"],
    ),
    "swissai-preference": Request(
        "swissai",
        ["swissai/train-preference.yaml", "accelerate_config=swissai/accelerate/ds-zero3.yaml"],
    ),
    "neox": Request("neox", ["neox.yml"], num_processes=8),
    "llamafactory": Request("llamafactory", ["llamafactory/sft.yaml"], num_processes=1),
    "llamafactory-dpo": Request(
        "llamafactory",
        ["llamafactory/dpo.yaml"],
        drop=["cutoff_len"],
        overrides=["dpo.max_prompt_length=1024", "dpo.max_completion_length=1024"],
        num_processes=1,
    ),
    "llamafactory-reward": Request(
        "llamafactory",
        ["llamafactory/reward.yaml"],
        drop=["cutoff_len"],
        overrides=["pairs.max_prompt_length=1024", "pairs.max_completion_length=1024"],
        num_processes=1,
    ),
}
