"""A folder that isn't the whole model is refused, and says why."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.real_data import TOKENIZERS, needs_tokenizers
from post_training.core.errors import PostTrainingError
from post_training.models.load import check_vocabulary, load_model, load_tokenizer


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def refusal(path: Path) -> str:
    with pytest.raises(PostTrainingError) as error:
        load_model(path, dtype="float32", attn_implementation="sdpa")
    return str(error.value)


def test_load_model_from_nowhere_is_refused(tmp_path: Path):
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such model folder"


def test_load_model_from_a_runs_folder_names_what_was_meant(tmp_path: Path):
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
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / file).unlink()
    with pytest.raises(PostTrainingError, match="no tokenizer can be loaded from this folder"):
        load_tokenizer(copy)


def test_check_vocabulary_tokenizer_larger_than_the_model_is_refused(copy: Path):
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens(["<new>"])
    model = load_model(copy, dtype="float32", attn_implementation="sdpa")
    with pytest.raises(PostTrainingError, match="has 321 tokens, the model embeds 320"):
        check_vocabulary(model, tokenizer)


# Code of the folder's own

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "evil"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


IN_CONFIG = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}
IN_TOKENIZER = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}


@pytest.mark.parametrize(
    ("file", "auto_map", "with_file"),
    [
        ("config.json", IN_CONFIG, True),
        ("config.json", IN_CONFIG, False),
        ("tokenizer_config.json", IN_TOKENIZER, True),
        ("tokenizer_config.json", IN_TOKENIZER, False),
        (None, None, True),
    ],
)
def test_folder_with_code_is_refused_in_one_line_and_nothing_is_run(
    file: str | None,
    auto_map: dict | None,
    with_file: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    mark = tmp_path / "it ran"
    if with_file:
        (folder / "evil.py").write_text(EVIL.format(mark=str(mark)))
    if file is not None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**settings, "auto_map": auto_map}))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 5))  # as somebody at a terminal would
    what = f"{file} has an auto_map" if file else "it holds evil.py"
    for load in (
        lambda: load_tokenizer(folder),
        lambda: load_model(folder, dtype="float32", attn_implementation="sdpa"),
    ):
        with pytest.raises(PostTrainingError, match=f"{folder}: the model brings code .*: {what}"):
            load()
    assert not mark.exists()


# Impossible numbers


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ([], "config.json: must be a JSON object (got list)"),
        ({"num_attention_heads": 0}, "the model can't be loaded: "),
        ({"hidden_size": 10**9}, "the model can't be loaded: "),
        ({"num_hidden_layers": "two"}, "the model can't be loaded: "),
    ],
)
def test_load_model_with_impossible_numbers_is_refused_in_one_line(
    settings: Any, line: str, copy: Path
):
    if settings:
        settings = {**json.loads((copy / "config.json").read_text()), **settings}
    (copy / "config.json").write_text(json.dumps(settings))
    assert refusal(copy).startswith(str(copy))
    assert line in refusal(copy)
    assert len(refusal(copy).splitlines()) == 1


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", 3])
def test_load_model_whose_index_leads_out_of_the_folder_is_refused(name: Any, copy: Path):
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(copy).startswith(f"{copy}/model.safetensors.index.json: ")


# Ids of a tokenizer


def with_class(folder: Path, name: str) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": name}))
    return folder


def test_load_tokenizer_whose_class_gives_other_ids_than_its_file_is_refused(copy: Path):
    with pytest.raises(
        PostTrainingError, match=r"tokenizer\.json and the class .* LlamaTok"
    ) as caught:
        load_tokenizer(with_class(copy, "LlamaTokenizerFast"))
    assert "PreTrainedTokenizerFast" in caught.value.hint
    load_tokenizer(with_class(copy, "PreTrainedTokenizerFast"))


@needs_tokenizers
def test_real_tokenizers_give_the_ids_of_their_files_or_are_refused(tmp_path: Path):
    for name in ("qwen3", "smollm2"):
        load_tokenizer(TOKENIZERS / name)
    with pytest.raises(PostTrainingError, match="disagree on the ids of 'Hello world'"):
        load_tokenizer(TOKENIZERS / "deepseek-v3")
    copied = Path(shutil.copytree(TOKENIZERS / "deepseek-v3", tmp_path / "deepseek"))
    load_tokenizer(with_class(copied, "PreTrainedTokenizerFast"))
