"""Every stage on a tiny model of each family, against plain transformers in float64, row by row.

docs/guides/models.md has the table of what is found; three families are in `make test`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from helpers.annotation_stages import run_stage
from helpers.dpo_runs import dpo, preference_rows
from helpers.families import FAMILIES, OF_IMAGES, make_family
from helpers.row_files import read_rows, write_rows
from helpers.sft_runs import metrics, sft
from post_training.core.errors import PostTrainingError
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION

DOCS = Path(__file__).parents[3] / "docs/guides/models.md"
STAGES = ("sft", "packed", "generate", "logprobs", "dpo", "saved")
IN_MAKE_TEST = ("Qwen3-MoE", "Gemma 3", "Granite")
# transformers has no other attention for them.
EAGER = ("bloom", "deepseek_v4", "falcon_mamba", "gpt_oss", "mamba", "mamba2", "mimo_v2_flash")


# transformers' own step with a cache differs so much, in nats a token, from a pass over the whole.
STEP_DIFFERS = {"Bamba": 1e-2, "MiniMax": 1e-2}


def plain(folder: Path, name: str, dtype: torch.dtype = torch.float64) -> Any:
    model_type, settings = FAMILIES[name]
    if model_type == "apertus1p5":
        return plain_apertus_1p5(folder, dtype)
    auto = AutoModelForImageTextToText if model_type in OF_IMAGES else AutoModelForCausalLM
    attention = "eager" if model_type in EAGER else "sdpa"
    # The grouped products of experts have no float64.
    of_experts = any("expert" in key for key in settings)
    experts = {"experts_implementation": "eager"} if of_experts else {}
    return auto.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, **experts
    ).eval()


def plain_apertus_1p5(folder: Path, dtype: torch.dtype) -> Any:
    """Apertus with a smaller output layer."""
    settings = json.loads((folder / "config.json").read_text())["text_config"]
    model = ApertusForCausalLM(ApertusConfig.from_dict(settings))
    weights = {
        name.replace("model.language_model.", "model."): tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "vision" not in name
    }
    model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def logprobs_of(model: Any, ids: list[int]) -> Any:
    """Of each of ids[1:], float64, without a cache."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).squeeze(1)


class Tried:
    """One family's stages, each run once. found: {stage: `yes`, or the line of refusal}."""

    def __init__(self, name: str, base: Path, folder: Path):
        self.name, self.folder = name, folder
        self.model = folder / "base"
        make_family(name, base, self.model)
        model_type = FAMILIES[name][0]
        self.settings = {"path": str(self.model)}
        if model_type in EAGER:
            self.settings["attn_implementation"] = "eager"
        self.found = {}
        for stage in STAGES:
            try:
                getattr(self, f"try_{stage}")()
                self.found[stage] = "yes"
            except PostTrainingError as error:
                self.found[stage] = error.problem

    def data(self, file: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        path = write_rows(self.folder / file, rows)
        return {"chat_template": "chatml", "datasets": [{"path": str(path)}]}

    def train(self, run: str, **settings: Any) -> Path:
        """One step over four rows; at a rate that leaves the weights as they are."""
        rows = [{"question": f"What is {a}?", "answer": f"It is {a}." + " so" * 9 * (a % 3)}
                for a in range(4)]  # fmt: skip
        config = {
            "model": self.settings,
            "data": self.data("rows.jsonl", rows),
            "training": {"max_steps": 1, "effective_batch_size": 4, "learning_rate": 1e-30,
                         "per_device_train_batch_size": 2, "weight_decay": 0.0, "warmup": 0},
            "sft": {"max_seq_length": 96},
            "num_threads": 1,
            **settings,
        }  # fmt: skip
        sft(config, self.folder / run)
        return self.folder / run

    def check_step(self, run: Path) -> None:
        """Loss and gradient norm of the step are those of plain transformers."""
        dataset = PreparedDataset.open(run / "data")
        model = plain(self.model, self.name)
        sums, count = torch.zeros((), dtype=torch.float64), 0
        for number in range(len(dataset)):
            row, start = dataset.read(number), 0
            for length in row.lengths:
                span = slice(start, start + length)
                asked = torch.from_numpy(row.kinds[span][1:] == COMPLETION)
                sums = sums - logprobs_of(model, row.ids[span].tolist())[asked].sum()
                count, start = count + int(asked.sum()), start + length
        loss = sums / count
        loss.backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        norm = torch.stack([each.norm() for each in gradients]).norm()
        [line] = [line for line in metrics(run) if "loss" in line][:1]
        coefficient = line.get("router_aux_loss", 0.0) * self.router_coefficient()
        assert line["loss"] - coefficient == pytest.approx(loss.item(), rel=2e-5)
        if not coefficient:
            assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)

    def router_coefficient(self) -> float:
        settings = json.loads((self.model / "config.json").read_text())
        return settings.get("router_aux_loss_coef") or 0.0

    def try_sft(self) -> None:
        self.check_step(self.train("sft"))

    def try_packed(self) -> None:
        one_row = {"effective_batch_size": 1, "per_device_train_batch_size": 1}
        settings = {"max_steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "warmup": 0}
        run = self.train(
            "packed",
            sft={"max_seq_length": min(512, self.positions()), "packing": "bfd"},
            training={**settings, **one_row, "shuffle": False},
        )
        if len(PreparedDataset.open(run / "data")) == 1:
            self.check_step(run)

    def positions(self) -> int:
        """What the model reads at most, as its family calls it."""
        settings = json.loads((self.model / "config.json").read_text())
        text = settings.get("text_config", settings)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        limits = [text.get("max_position_embeddings"), text.get("n_positions")]
        limits.append(rope.get("original_max_position_embeddings"))
        return min((limit for limit in limits if limit), default=512)

    def try_generate(self) -> None:
        rows = [{"question": f"What is {a}?", "answer": "-"} for a in range(2)]
        config = {
            "model": self.settings,
            "data": self.data("prompts.jsonl", rows),
            "sampling": {"n": 2, "max_tokens": 6},
            "num_threads": 1,
        }
        run_stage("generate", config, self.folder / "generated")
        self.check_branches(self.folder / "generated", "completion_token_logprobs")

    def try_logprobs(self) -> None:
        if not (self.folder / "generated/dataset").exists():
            raise PostTrainingError("there were no samples")
        path = self.folder / "generated/dataset/rows.jsonl"
        config = {
            "model": self.settings,
            "data": {"chat_template": "chatml", "datasets": [{"path": str(path)}]},
            "num_threads": 1,
        }
        run_stage("logprobs", config, self.folder / "scored")
        self.check_branches(self.folder / "scored", "completion_ref_logprob")

    def check_branches(self, run: Path, key: str) -> None:
        model = plain(self.model, self.name)
        number = 0
        for row in read_rows(run):
            for branch in row["conversation_branches"]:
                if (ids := branch.get("completion_token_ids")) is None:
                    continue
                number += 1
                with torch.no_grad():
                    expected = logprobs_of(model, [*row["prompt_token_ids"], *ids])[-len(ids) :]
                found = branch[key]
                drawn = isinstance(found, list)
                total = math.fsum(found) if drawn else found
                limit = STEP_DIFFERS.get(self.name, 3e-4) if drawn else 3e-4
                assert total == pytest.approx(expected.sum().item(), abs=limit * len(ids))
        assert number == 4

    def try_dpo(self) -> None:
        config = {
            "model": self.settings,
            "data": self.data("pairs.jsonl", preference_rows(4)),
            "dpo": {"max_prompt_length": 96, "max_completion_length": 64},
            "loss": {"name": "dpo", "beta": 0.1},
            "training": {"max_steps": 1, "effective_batch_size": 4, "learning_rate": 1e-30,
                         "per_device_train_batch_size": 2},
            "num_threads": 1,
        }  # fmt: skip
        dpo(config, self.folder / "dpo")  # which compares the reference with the model itself
        [line] = [line for line in metrics(self.folder / "dpo") if "loss" in line][:1]
        coefficient = line.get("router_aux_loss", 0.0) * self.router_coefficient()
        assert line["loss"] - coefficient == pytest.approx(math.log(2), abs=1e-4)

    def try_saved(self) -> None:
        """In the layout of the base, and plain transformers makes the same of it."""
        made = self.folder / "sft/model"
        if not made.exists():
            raise PostTrainingError("nothing was trained")
        before, after = names_and_shapes(self.model), names_and_shapes(made)
        assert before == after
        ids = torch.arange(3, 33)[None]
        with torch.no_grad():
            one, other = (
                plain(each, self.name, torch.float32)(input_ids=ids).logits
                for each in (self.model, made)
            )
        assert (one - other).abs().max() < 1e-5
        plain(made, self.name, torch.float32).generate(ids, max_new_tokens=2, do_sample=False)


def names_and_shapes(folder: Path) -> dict[str, Any]:
    return {
        name: tensor.shape
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def rows_in_docs() -> dict[str, dict[str, str]]:
    """{family: {stage: its cell}}, of both tables."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {
        name: dict(zip(STAGES, of_stages, strict=True))
        for name, *of_stages in cells
        if name != "Family"
    }


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_MAKE_TEST else pytest.param(name, marks=pytest.mark.long)
        for name in FAMILIES
    ],
)
def test_family_does_what_the_table_says(name: str, model: Path, tmp_path: Path):
    found = Tried(name, model, tmp_path).found
    cells = {stage: "yes" if each == "yes" else "no" for stage, each in found.items()}
    assert cells == rows_in_docs().get(name), json.dumps(found, indent=1)


def test_table_has_each_family_that_is_tried():
    assert list(rows_in_docs()) == list(FAMILIES)
    assert re.search(r"`make test-long`", DOCS.read_text())
