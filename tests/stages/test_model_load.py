"""A folder that isn't the whole model is refused, and says why."""

import json
import shutil
from pathlib import Path

import pytest

from post_training.core.errors import PostTrainingError

pytestmark = pytest.mark.stack


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def refusal(path: Path) -> str:
    from post_training.models.load import load_model

    with pytest.raises(PostTrainingError) as error:
        load_model(path, dtype="float32", attn_implementation="sdpa")
    return str(error.value)


def test_load_model_from_nowhere_is_refused(tmp_path: Path):
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such model folder"


def test_load_model_from_a_runs_folder_names_what_was_meant(tmp_path: Path):
    from post_training.models.load import load_tokenizer

    (tmp_path / "run.json").touch()
    with pytest.raises(PostTrainingError, match="the folder of a run, not of a model") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "model") in str(caught.value)


def test_load_model_from_a_file_is_refused(copy: Path):
    file = copy / "model.safetensors"
    assert refusal(file) == f"{file}: is a file, not a model folder"


def test_load_model_without_config_is_refused(copy: Path):
    (copy / "config.json").unlink()
    assert refusal(copy) == f"{copy}: not a model: it has no config.json"


def test_load_model_of_an_unknown_kind_is_refused(copy: Path):
    (copy / "config.json").write_text('{"model_type": "marvellous"}')
    assert refusal(copy).startswith(f"{copy}: the model can't be loaded: ")
    assert "marvellous" in refusal(copy)


def test_load_model_without_weights_is_refused(copy: Path):
    (copy / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(copy)


def test_load_model_with_truncated_weights_is_refused(copy: Path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(copy).startswith(f"{copy}: the model can't be loaded: ")


def test_load_model_with_more_layers_than_weights_is_refused(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert refusal(copy) == (
        f"{copy}: 9 weights are missing: model.layers.2.input_layernorm.weight, …"
    )


def test_load_model_with_weights_of_another_size_is_refused(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 321}))
    assert refusal(copy) == (
        f"{copy}: weights of another size than config.json says: "
        "lm_head.weight is [320, 32], must be [321, 32]"
    )


def test_load_model_with_generation_settings_that_cannot_be_saved_is_refused(copy: Path):
    (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    assert refusal(copy).startswith(
        f"{copy}/generation_config.json: contradicting settings: `temperature`: `do_sample` is not"
    )


def test_load_tokenizer_from_a_model_without_one_is_refused(copy: Path):
    from post_training.models.load import load_tokenizer

    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / file).unlink()
    with pytest.raises(PostTrainingError, match="no tokenizer can be loaded from this folder"):
        load_tokenizer(copy)


def test_check_vocabulary_tokenizer_larger_than_the_model_is_refused(copy: Path):
    from post_training.models.load import check_vocabulary, load_model, load_tokenizer

    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens(["<new>"])
    model = load_model(copy, dtype="float32", attn_implementation="sdpa")
    with pytest.raises(PostTrainingError, match="has 321 tokens, the model embeds 320"):
        check_vocabulary(model, tokenizer)
