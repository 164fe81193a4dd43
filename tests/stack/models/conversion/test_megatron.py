"""Checkpoints that megatron-core itself saved become models with its logits, and the other way.

All of it is `long`: importing and running megatron-core takes some twenty seconds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from helpers import megatron_models
from helpers.gloo_ranks import on_ranks
from helpers.megatron_models import FAMILIES, IDS, VOCABULARY
from post_training.stages.context import StageContext
from post_training.stages.weights.config import ConvertConfig

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.long


def convert(run_dir: Path, **settings: Any) -> Path:
    from post_training.stages.weights.convert import run

    run_dir.mkdir(parents=True)
    result = run(ConvertConfig.model_validate(settings), StageContext(run_dir))
    return run_dir / next(iter(result.artifacts.values()))


def logits(folder: Path) -> Tensor:
    """[tokens, vocabulary], by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits[0]


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Path:
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("megatron")
    [found] = on_ranks(megatron_models.save_families, 1, folder)
    return folder, found


@pytest.fixture(scope="module")
def converted(
    saved: tuple[Path, dict[str, Tensor]], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("converted")

    def folder(family: str, kind: str) -> Path:
        made = root / f"{family}-{kind}"
        if not made.exists():
            source = saved[0] / made.name
            convert(made, checkpoint=source, tokenizer=tokenizer, vocab_size=VOCABULARY)
        return made / "model"

    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_convert_of_megatrons_checkpoint_gives_megatrons_logits(
    family: str, kind: str, saved: Any, converted: Callable[[str, str], Path]
):
    found = logits(converted(family, kind))
    torch.testing.assert_close(found, torch.tensor(saved[1][family]), **TOLERANCE)


def test_convert_back_is_loaded_by_megatron_with_the_same_logits(
    saved: Any, converted: Callable[[str, str], Path], tmp_path: Path
):
    expected = {}
    for family in ("llama", "tied", "apertus", "mixtral"):
        source = converted(family, "torch_dist")
        for kind in ("torch_dist", "torch"):
            settings = {"format": kind}
            if kind == "torch" or family == "mixtral":
                settings["transformer_impl"] = "local"
            made = convert(
                tmp_path / "runs" / f"{family}-{kind}",
                checkpoint=source,
                to="megatron",
                megatron=settings,
            )
            shutil.move(made, tmp_path / f"{family}-{kind}")
            expected[f"{family}-{kind}"] = saved[1][family]
    [found] = on_ranks(megatron_models.load_families, 1, tmp_path)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(
            torch.tensor(each), torch.tensor(expected[name]), **TOLERANCE, msg=name
        )


def test_convert_leaves_a_complete_folder_without_places(
    converted: Callable[[str, str], Path], tokenizer: Path
):
    folder = converted("apertus", "torch_dist")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["ApertusForCausalLM"]
    assert settings["vocab_size"] == VOCABULARY
    assert "_name_or_path" not in settings
    own = json.loads((tokenizer / "tokenizer.json").read_text())
    assert json.loads((folder / "tokenizer.json").read_text()) == own


def test_convert_of_shards_of_tensor_and_expert_parallel_ranks_gives_megatrons_logits(
    tokenizer: Path, tmp_path: Path
):
    found = on_ranks(megatron_models.save_on_ranks, 4, tmp_path)
    for kind in ("torch_dist", "torch"):
        folder = convert(
            tmp_path / f"{kind}-run",
            checkpoint=tmp_path / kind,
            tokenizer=tokenizer,
            vocab_size=VOCABULARY,
        )
        torch.testing.assert_close(logits(folder), torch.tensor(found[0]), **TOLERANCE)
