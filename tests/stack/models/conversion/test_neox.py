"""Checkpoints of GPT-NeoX, written here head by head from its public layout, become the models
whose weights they hold."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoTokenizer

from helpers.tiny_models import make_model
from post_training.core.errors import PostTrainingError
from post_training.stages.context import StageContext
from post_training.stages.weights.config import ConvertConfig

HEADS, HEAD_DIM, HIDDEN, LAYERS = 4, 8, 32, 2
IDS = torch.arange(3, 43)[None]
GQA = {"head_dim": HEAD_DIM, "num_attention_heads": HEADS, "hidden_size": HIDDEN}
SETTINGS = {
    "num-layers": LAYERS,
    "hidden-size": HIDDEN,
    "num-attention-heads": HEADS,
    "max-position-embeddings": 128,
    "pos-emb": "rotary",
    "no-weight-tying": True,
}


def convert(run_dir: Path, **settings: Any) -> Path:
    from post_training.stages.weights.convert import run

    run_dir.mkdir(parents=True)
    result = run(ConvertConfig.model_validate(settings), StageContext(run_dir))
    return run_dir / result.artifacts["model"]


def heads(weight: Tensor) -> list[Tensor]:
    return list(weight.split(HEAD_DIM))


def fused(q: Tensor, k: Tensor, v: Tensor, rank: int, ranks: int) -> Tensor:
    """What one rank has of query_key_value: with as many key heads as query heads q, k, v of one
    head after another; with fewer, all its q, then its k, then its v."""
    queries, keys, values = heads(q), heads(k), heads(v)
    own = slice(rank * len(queries) // ranks, (rank + 1) * len(queries) // ranks)
    own_kv = slice(rank * len(keys) // ranks, (rank + 1) * len(keys) // ranks)
    if len(queries) == len(keys):
        every = zip(queries[own], keys[own], values[own], strict=True)
        return torch.cat([part for head in every for part in head])
    return torch.cat([*queries[own], *keys[own_kv], *values[own_kv]])


def write_llama(folder: Path, model: Any, ranks: int, settings: dict[str, Any], old: bool) -> None:
    """As DeepSpeed saves it: a file for each layer and rank. old: w1, w2, w3 instead of linear1."""
    state = model.state_dict()
    folder.mkdir(parents=True)
    (folder / "configs").mkdir()
    text = {**SETTINGS, "norm": "rmsnorm", "activation": "silu" if old else "swiglu", **settings}
    text |= {"rms-norm-epsilon": model.config.rms_norm_eps, "use-bias-in-attn-linear": False}
    text |= {"model-parallel-size": ranks, "num-kv-heads": model.config.num_key_value_heads}
    (folder / "configs/llama.yml").write_text(yaml.safe_dump(text))

    def rows(weight: Tensor, rank: int) -> Tensor:
        return weight.chunk(ranks, 0)[rank].clone()

    def columns(weight: Tensor, rank: int) -> Tensor:
        return weight.chunk(ranks, 1)[rank].clone()

    for rank in range(ranks):

        def save(number: int, content: dict[str, Tensor], rank: int = rank) -> None:
            torch.save(content, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")

        save(0, {"word_embeddings.weight": rows(state["model.embed_tokens.weight"], rank)})
        for layer in range(LAYERS):
            own = f"model.layers.{layer}."
            q, k, v = (state[f"{own}self_attn.{each}_proj.weight"] for each in "qkv")
            gate, up = (rows(state[f"{own}mlp.{x}_proj.weight"], rank) for x in ("gate", "up"))
            down = columns(state[f"{own}mlp.down_proj.weight"], rank)
            mlp = (
                {"mlp.w1.weight": gate, "mlp.w3.weight": up, "mlp.w2.weight": down}
                if old
                else {"mlp.linear1.weight": torch.cat([up, gate]), "mlp.linear2.weight": down}
            )
            norms = {"input_layernorm": "input_layernorm"}
            norms["post_attention_layernorm"] = "post_attention_layernorm"
            save(
                layer + 2,
                {
                    "attention.query_key_value.weight": fused(q, k, v, rank, ranks),
                    "attention.dense.weight": columns(state[f"{own}self_attn.o_proj.weight"], rank),
                    "attention.rotary_emb.inv_freq": torch.ones(4),
                    **{f"{name}.scale": state[f"{own}{name}.weight"].clone() for name in norms},
                    **mlp,
                },
            )
        save(LAYERS + 3, {"norm.scale": state["model.norm.weight"].clone()})
        save(LAYERS + 4, {"final_linear.weight": rows(state["lm_head.weight"], rank)})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def grouped(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("neox") / "llama"
    return make_model("llama", model, folder, **GQA, num_key_value_heads=2, intermediate_size=48)


@pytest.mark.parametrize(("ranks", "old"), [(1, False), (2, False), (2, True)])
def test_convert_of_neox_llama_gives_the_same_logits(
    ranks: int, old: bool, grouped: Any, model: Path, tmp_path: Path
):
    root = tmp_path / "checkpoints"
    write_llama(root / "global_step10", grouped, ranks, {}, old)
    (root / "latest").write_text("global_step10\n")
    made = convert(tmp_path / "run", checkpoint=root, tokenizer=model, vocab_size="padded")
    assert torch.equal(logits(loaded(made)), logits(grouped))


def test_convert_of_neox_llama_with_as_many_key_heads(model: Path, tmp_path: Path):
    source = make_model("llama", model, tmp_path / "source", **GQA, num_key_value_heads=HEADS)
    write_llama(tmp_path / "global_step10", source, 2, {}, old=False)
    made = convert(
        tmp_path / "run",
        checkpoint=tmp_path / "global_step10",
        tokenizer=model,
        vocab_size="padded",
    )
    assert torch.equal(logits(loaded(made)), logits(source))


def test_convert_of_norms_that_differ_is_refused_or_their_mean(
    grouped: Any, model: Path, tmp_path: Path
):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 2, {}, old=False)
    path = folder / f"layer_{LAYERS + 3:02d}-model_01-model_states.pt"
    torch.save({"norm.scale": torch.load(path)["norm.scale"] + 0.5}, path)
    settings = {"checkpoint": folder, "tokenizer": model, "vocab_size": "padded"}
    with pytest.raises(PostTrainingError, match=r"decoder.final_layernorm.weight: .* up to 0\.5"):
        convert(tmp_path / "refused", **settings)
    assert not (tmp_path / "refused/model").exists()
    made = convert(tmp_path / "mean", **settings, differing_copies="average")
    expected = grouped.state_dict()["model.norm.weight"] + 0.25
    assert torch.equal(loaded(made).state_dict()["model.norm.weight"], expected)


def test_convert_keeps_the_ends_of_text_that_a_config_names(
    grouped: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 1, {}, old=False)
    named = tmp_path / "config.json"
    given = {"model_type": "llama", "eos_token_id": [5, 7], "pad_token_id": None}
    named.write_text(json.dumps(given))
    settings = {"checkpoint": folder, "tokenizer": model, "vocab_size": "padded", "config": named}
    made = convert(tmp_path / "run", **settings)
    own = AutoTokenizer.from_pretrained(model)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((made / name).read_text())
        assert (found["eos_token_id"], found.get("pad_token_id")) == ([5, 7], own.pad_token_id)
    told = f"eos_token_id: [5, 7] is taken; of the tokenizer it is {own.eos_token_id}"
    assert told in capsys.readouterr().err
    named.write_text(json.dumps({**given, "eos_token_id": [5, 10**6]}))
    with pytest.raises(PostTrainingError, match="eos_token_id: must be < "):
        convert(tmp_path / "refused", **settings)


def test_convert_of_neox_names_what_is_wrong(grouped: Any, model: Path, tmp_path: Path):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 2, {}, old=False)
    settings = {"checkpoint": folder, "tokenizer": model, "vocab_size": "padded"}
    path = folder / "layer_03-model_01-model_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(PostTrainingError, match=f"{path}: cut off"):
        convert(tmp_path / "cut", **settings)
    path.unlink()
    with pytest.raises(PostTrainingError, match=f"{path}: the file is missing"):
        convert(tmp_path / "missing", **settings)
    path.write_bytes(content)
    foreign = folder / "layer_03-model_02-model_states.pt"
    foreign.write_bytes(content)
    with pytest.raises(PostTrainingError, match=f"{foreign}: a shard of another run"):
        convert(tmp_path / "foreign", **settings)
    foreign.unlink()
    text = folder / "configs/llama.yml"
    text.write_text(text.read_text().replace("pos-emb: rotary", "pos-emb: alibi"))
    with pytest.raises(PostTrainingError, match="pos_emb is 'alibi', must be 'rotary'"):
        convert(tmp_path / "alibi", **settings)


def test_convert_of_a_pickle_that_names_a_function_is_refused_and_runs_nothing(
    grouped: Any, model: Path, tmp_path: Path
):
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 1, {}, old=False)
    path = folder / "layer_02-model_00-model_states.pt"
    torch.save({"x": Trap()}, path)
    with pytest.raises(PostTrainingError, match=str(path)):
        convert(tmp_path / "run", checkpoint=folder, tokenizer=model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num-layers": None}, "its settings lack num_layers"),
        ({"num-layers": "two"}, "num_layers is 'two', must be an integer > 0"),
        ({"hidden-size": 30}, "num_attention_heads is 4, must divide hidden_size, which is 30"),
        ({"num-kv-heads": 3}, "num_kv_heads is 3, must divide num_attention_heads, which is 4"),
        ({"num-kv-heads": 4}, "linear_qkv.weight has 64 rows, must be 96 by the settings"),
        ({"model-parallel-size": 4}, "model_parallel_size is 4, must divide num_kv_heads"),
        ({"max-position-embeddings": None}, "max_position_embeddings is None, must be an integer"),
        ({"rms-norm-epsilon": "small"}, "no config.json can be made of its settings"),
    ],
)
def test_convert_of_neox_settings_that_no_model_has_is_refused(
    change: dict[str, Any], words: str, grouped: Any, model: Path, tmp_path: Path
):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 1, change, old=False)
    text = folder / "configs/llama.yml"
    text.write_text(yaml.safe_dump({**yaml.safe_load(text.read_text()), **change}))
    with pytest.raises(PostTrainingError, match=re.escape(words)):
        convert(tmp_path / "run", checkpoint=folder, tokenizer=model, vocab_size="padded")
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp.w3.weight": None}, "linear_fc1.weight up is missing"),
        ({"mlp.w9.weight": torch.ones(2)}, "mlp.w9.weight is no weight of a Llama or GPT-NeoX"),
        ({"module": [1]}, "module is a list, must be a dict of weights"),
    ],
)
def test_convert_of_neox_layer_that_is_none_is_refused(
    change: dict[str, Any], words: str, grouped: Any, model: Path, tmp_path: Path
):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 1, {}, old=True)
    for path in folder.glob("layer_0[23]-*"):
        content = {**torch.load(path), **change}
        torch.save({key: value for key, value in content.items() if value is not None}, path)
    with pytest.raises(PostTrainingError, match=re.escape(words)):
        convert(tmp_path / "run", checkpoint=folder, tokenizer=model, vocab_size="padded")


def test_convert_of_neox_rank_of_another_size_is_refused(grouped: Any, model: Path, tmp_path: Path):
    folder = tmp_path / "global_step10"
    write_llama(folder, grouped, 2, {}, old=False)
    path = folder / "layer_02-model_01-model_states.pt"
    content = torch.load(path)
    torch.save({**content, "attention.dense.weight": torch.ones(16, 16)}, path)
    with pytest.raises(PostTrainingError, match=r"attention.dense.weight is \[16, 16\] in .* must"):
        convert(tmp_path / "run", checkpoint=folder, tokenizer=model, vocab_size="padded")
