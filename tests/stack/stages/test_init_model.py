"""A new model: the same bytes each time, loadable by plain transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.sft_runs import TINY
from post_training.core.errors import PostTrainingError
from post_training.core.hashing import hash_files
from post_training.stages.config import InitModelConfig

InitModel = Callable[..., Path]


@pytest.mark.parametrize("architecture", ["llama", "apertus"])
def test_init_model_twice_gives_the_same_bytes(
    architecture: str, init_model: InitModel, tmp_path: Path
):
    one = init_model(tmp_path / "one", architecture=architecture)
    other = init_model(tmp_path / "some" / "other", architecture=architecture)
    assert hash_files(one) == hash_files(other)


def test_init_model_with_another_seed_changes_the_weights_only(
    model: Path, init_model: InitModel, tmp_path: Path
):
    other = hash_files(init_model(tmp_path / "run", seed=1))
    same = hash_files(model)
    assert {name for name in same if same[name] != other[name]} == {"model.safetensors"}


def test_init_model_has_the_shape_asked_for(init_model: InitModel, tmp_path: Path):
    folder = init_model(tmp_path / "run", vocab_size=300, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.float32
    embeddings, attention, mlp, norms = 300 * 32, 2 * 32 * (32 + 16), 3 * 32 * 64, 2 * 32
    assert model.num_parameters() == embeddings + 2 * (attention + mlp + norms) + 32
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("text", ["1 + 1 = 2", "ä 漢 🙂\n\t x  ", "<|im_end|> and </s>"])
def test_init_model_tokenizer_gives_any_text_back(text: str, model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_init_model_generation_stops_at_the_end_of_a_turn(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    stops = GenerationConfig.from_pretrained(model).eos_token_id
    assert [tokenizer.decode([stop]) for stop in stops] == ["</s>", "<|im_end|>"]


def test_init_model_vocabulary_without_room_for_the_bytes_is_refused(
    init_model: InitModel, tmp_path: Path
):
    with pytest.raises(PostTrainingError, match="must be ≥ 261: 256 bytes and 5 special tokens"):
        init_model(tmp_path / "run", vocab_size=260)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"hidden_size": 36}, "multiple of 2 × num_attention_heads = 8"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads = 3"),
    ],
)
def test_init_model_sizes_that_do_not_fit_are_refused(settings: dict[str, int], problem: str):
    with pytest.raises(ValueError, match="multiple of") as refusal:
        InitModelConfig.model_validate({**TINY, "corpus": ["x.jsonl"], **settings})
    assert problem in str(refusal.value)
