"""A folder of more than a language model: the rest is told, kept, and found again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from helpers.families import OF_IMAGES, SUPPORTED, make_apertus_1p5, make_whole
from helpers.sft_runs import changed, sft
from helpers.tiny_models import make_model
from post_training.data.prepared.dataset import PreparedDataset
from post_training.data.rows import COMPLETION
from post_training.models.load import load_model, load_tokenizer
from post_training.models.save import save_model_folder
from post_training.train.config import SftLossConfig
from post_training.train.sft_loss import SftCollator

SETTINGS = dict(SUPPORTED.values())  # {model_type: settings}
OF_TEXT = ("language_model", "lm_head")


@pytest.fixture(scope="module")
def multimodal(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder as the hub has it, in bfloat16, with a layer of `mtp` beside a language model."""

    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family) / "model"
        made = make_whole(family, SETTINGS[family], model, folder)
        made.bfloat16().save_pretrained(folder)
        # By the class that transformers takes for the family, whatever the folder says.
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        if family == "qwen3_5":
            weights = load_file(folder / "model.safetensors")
            weights["mtp.fc.weight"] = torch.rand(3, 3, dtype=torch.bfloat16)
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
        return folder

    return make


def all_weights(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        own = load_file(file)
        assert not found.keys() & own.keys()
        found |= own
    return found


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "target_modules": ["o_proj"]}])
@pytest.mark.parametrize("family", OF_IMAGES)
def test_vision_tower_is_kept_byte_for_byte_and_the_folder_is_of_its_architecture(
    family: str,
    lora: dict[str, Any] | None,
    multimodal: Any,
    config: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    folder = multimodal(family)
    settings = {"model.path": str(folder), "training.max_steps": 2, "lora": lora}
    sft(changed(config, **settings), tmp_path / "run")
    said = "".join(capsys.readouterr())
    assert f"{folder}: " in said
    assert "weights are in the folder and not in the model" in said
    made = tmp_path / "run/model"
    before, after = all_weights(folder), all_weights(made)
    assert before.keys() == after.keys()
    trained = 0
    for name in before:
        if any(part in name for part in OF_TEXT):
            trained += not torch.equal(before[name].float(), after[name].float())
        else:
            assert after[name].dtype == torch.bfloat16
            assert torch.equal(before[name], after[name]), name
    assert trained > 0
    assert (made / "preprocessor_config.json").read_text() == '{"image_mean": [0.5]}'
    one, other = (json.loads((each / "config.json").read_text()) for each in (folder, made))
    assert one["architectures"] == other["architectures"]
    assert one["vision_config"].keys() == other["vision_config"].keys()
    whole, info = AutoModelForImageTextToText.from_pretrained(
        made, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert type(whole).__name__ == one["architectures"][0]
    # Its own stages read it as they read the first, and keep it again.
    again = load_model(made, dtype="float32", attn_implementation="sdpa")
    assert (
        again.left_out == load_model(folder, dtype="float32", attn_implementation="sdpa").left_out
    )
    name = "model.embed_tokens.weight"
    embedded = next(after[each] for each in after if each.endswith("embed_tokens.weight"))
    assert torch.equal(again.state_dict()[name], embedded)


def test_what_cannot_be_kept_is_told_with_the_folder_that_lacks_it(model: Path, tmp_path: Path):
    loaded = load_model(model, dtype="float32", attn_implementation="sdpa")
    loaded.left_out = ["vision.weight"]
    base = Path(shutil.copytree(model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "whole"}))
    weights = load_file(base / "model.safetensors")
    others = {f"decoder.{name}": tensor for name, tensor in weights.items()}
    others["vision.weight"] = torch.zeros(2, 3)
    save_file(others, base / "model.safetensors", metadata={"format": "pt"})
    said = save_model_folder(tmp_path / "saved", loaded, load_tokenizer(model), base=base)
    assert said == (
        f"{tmp_path}/saved: only the language model is saved, llama: its weights have other names "
        "than those of whole"
    )
    assert all_weights(tmp_path / "saved").keys() == weights.keys()


def test_weights_without_a_place_in_a_plain_model_are_kept(
    model: Path, config: dict[str, Any], tmp_path: Path
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["extra.head.weight"] = torch.arange(6.0).view(2, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    sft(changed(config, **{"model.path": str(folder), "training.max_steps": 1}), tmp_path / "run")
    after = all_weights(tmp_path / "run/model")
    assert after.keys() == weights.keys()
    assert torch.equal(after["extra.head.weight"], weights["extra.head.weight"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert torch.equal(plain.lm_head.weight, after["lm_head.weight"])


@pytest.mark.parametrize("family", ["gemma3", "mistral3"])
def test_language_model_alone_gives_the_logits_of_the_whole(family: str, multimodal: Any):
    folder = multimodal(family)
    alone = load_model(folder, dtype="float32", attn_implementation="sdpa")
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model.eval()(input_ids=ids).logits for model in (alone, whole))
    assert (found - expected).abs().max() < 1e-5


# The shape of Apertus 1.5, as far as it is public: transformers has no class for it yet.


@pytest.fixture(scope="module")
def apertus(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of 400 ids, the upper ones of images; an output layer of 328."""
    folder = tmp_path_factory.mktemp("apertus") / "model"
    made = make_model("apertus", model, folder, vocab_size=400)
    made.bfloat16().save_pretrained(folder)
    make_apertus_1p5(folder, num_outputs=328)
    return folder


def test_apertus_1p5_is_trained_and_saved_in_its_layout(
    apertus: Path, config: dict[str, Any], tmp_path: Path
):
    loaded = load_model(apertus, dtype="float32", attn_implementation="sdpa")
    assert loaded.get_input_embeddings().num_embeddings == 400
    ids = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    assert loaded(input_ids=ids).logits.shape == (2, 20, 328)
    sft(changed(config, **{"model.path": str(apertus), "training.max_steps": 2}), tmp_path / "run")
    before, after = all_weights(apertus), all_weights(tmp_path / "run/model")
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    kept = "model.vision_tokenizer.conv.weight"
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before["lm_head.weight"].float(), after["lm_head.weight"])
    made = json.loads((tmp_path / "run/model/config.json").read_text())
    assert made == {
        **json.loads((apertus / "config.json").read_text()),
        "dtype": "float32",
        "text_config": made["text_config"],
    }
    load_model(tmp_path / "run/model", dtype="float32", attn_implementation="sdpa")
    dataset = PreparedDataset.open(tmp_path / "run/data")
    row = dataset.read(0)
    limit = int(row.ids[row.kinds == COMPLETION].max())  # as if that id were of an image
    collator = SftCollator(
        dataset, SftLossConfig(), pad_token_id=0, packed=False, num_outputs=limit
    )
    batch = collator([{"row": 0}])["batch"]
    assert batch.targets.max() < limit
    given = (row.kinds[1:] == COMPLETION) & (row.ids[1:] < limit)
    assert 0 < batch.sums.completion_weight == given.sum() < (row.kinds[1:] == COMPLETION).sum()
