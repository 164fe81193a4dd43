"""Which tensors of Megatron are which of Hugging Face, and the settings of the two.

A row of the table is one tensor of Megatron and the tensors that it becomes:

    copy    as it is
    qkv     [groups × (R + 2) × D, …]: of each group its R query heads, a key and a value head
            -> q [groups × R × D, …], k and v [groups × D, …]
    gated   [2 × intermediate, …]: gate, then up -> gate, up

Both directions go by the same rows, so what one writes the other reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from post_training.core.errors import PostTrainingError
from post_training.models.lazy_tensors import LazyTensor, concatenate

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Family = Literal["llama", "apertus", "mixtral", "gpt_neox"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, and what it has. rope_interleaved: whether the halves that a rotation turns
    are neighbours in the rows of q and k (Hugging Face's are half a head apart)."""

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    tied: bool
    experts: int = 0
    biases: bool = False
    rope_interleaved: bool = False


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron, and its names in Hugging Face's folder."""

    megatron: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Literal["copy", "qkv", "gated"] = "copy"


def rows(shape: Shape, vocabulary: int) -> Iterator[Row]:
    """Of the whole model, in its order. vocabulary: rows of the embeddings."""
    hidden = shape.hidden
    neox = shape.family == "gpt_neox"
    inner = "gpt_neox" if neox else "model"
    embedding = f"{inner}.{'embed_in' if neox else 'embed_tokens'}.weight"
    yield Row("embedding.word_embeddings.weight", (embedding,), (vocabulary, hidden))
    for layer in range(shape.layers):
        before, after = f"decoder.layers.{layer}.", f"{inner}.layers.{layer}."
        layer_rows = _neox_layer(shape) if neox else _layer(shape)
        for row in layer_rows:
            names = tuple(after + name for name in row.names)
            yield Row(before + row.megatron, names, row.shape, row.kind)
    final = f"{inner}.{'final_layer_norm' if neox else 'norm'}"
    yield Row("decoder.final_layernorm.weight", (f"{final}.weight",), (hidden,))
    if neox:
        yield Row("decoder.final_layernorm.bias", (f"{final}.bias",), (hidden,))
    if not shape.tied:
        head = "embed_out.weight" if neox else "lm_head.weight"
        yield Row("output_layer.weight", (head,), (vocabulary, hidden))


def _layer(shape: Shape) -> Iterator[Row]:
    hidden, width, apertus = shape.hidden, shape.intermediate, shape.family == "apertus"
    norms = (
        ("attention_layernorm", "feedforward_layernorm")
        if apertus
        else ("input_layernorm", "post_attention_layernorm")
    )
    yield Row("input_layernorm.weight", (f"{norms[0]}.weight",), (hidden,))
    yield from _qkv(shape, "weight", (hidden,))
    if shape.biases:
        yield from _qkv(shape, "bias", ())
    queries = shape.heads * shape.head_dim
    yield Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), (hidden, queries))
    if shape.biases:
        yield Row("self_attention.linear_proj.bias", ("self_attn.o_proj.bias",), (hidden,))
    if apertus:
        for each in "qk":
            norm = f"self_attn.{each}_norm.weight"
            yield Row(f"self_attention.{each}_layernorm.weight", (norm,), (shape.head_dim,))
    yield Row("pre_mlp_layernorm.weight", (f"{norms[1]}.weight",), (hidden,))
    if shape.family == "mixtral":
        gate = "block_sparse_moe.gate.weight"
        yield Row("mlp.router.weight", (gate,), (shape.experts, hidden))
        for expert in range(shape.experts):
            own, theirs = f"mlp.experts.{expert}", f"block_sparse_moe.experts.{expert}"
            names = (f"{theirs}.w1.weight", f"{theirs}.w3.weight")
            yield Row(f"{own}.linear_fc1.weight", names, (2 * width, hidden), "gated")
            yield Row(f"{own}.linear_fc2.weight", (f"{theirs}.w2.weight",), (hidden, width))
        return
    if apertus:
        yield Row("mlp.linear_fc1.weight", ("mlp.up_proj.weight",), (width, hidden))
        for each in ("alpha_p", "alpha_n"):
            yield Row(f"mlp.activation_func.{each}", (f"mlp.act_fn.{each}",), (1,))
    else:
        names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
        yield Row("mlp.linear_fc1.weight", names, (2 * width, hidden), "gated")
    yield Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), (hidden, width))


def _qkv(shape: Shape, what: str, columns: tuple[int, ...]) -> Iterator[Row]:
    names = tuple(f"self_attn.{each}_proj.{what}" for each in "qkv")
    width = (shape.heads + 2 * shape.groups) * shape.head_dim
    yield Row(f"self_attention.linear_qkv.{what}", names, (width, *columns), "qkv")


def _neox_layer(shape: Shape) -> Iterator[Row]:
    """transformers' GPT-NeoX keeps q, k and v fused as they are here: groups are single heads."""
    hidden, width = shape.hidden, shape.intermediate
    fused = 3 * shape.heads * shape.head_dim
    for own, name, out, columns in (
        ("input_layernorm", "input_layernorm", hidden, None),
        ("self_attention.linear_qkv", "attention.query_key_value", fused, hidden),
        ("self_attention.linear_proj", "attention.dense", hidden, hidden),
        ("pre_mlp_layernorm", "post_attention_layernorm", hidden, None),
        ("mlp.linear_fc1", "mlp.dense_h_to_4h", width, hidden),
        ("mlp.linear_fc2", "mlp.dense_4h_to_h", hidden, width),
    ):
        weight = (out,) if columns is None else (out, columns)
        yield Row(f"{own}.weight", (f"{name}.weight",), weight)
        yield Row(f"{own}.bias", (f"{name}.bias",), (out,))


def to_huggingface(row: Row, tensor: LazyTensor, shape: Shape) -> list[tuple[str, LazyTensor]]:
    """The tensors of a row, by their names."""
    if row.kind == "gated":
        half = tensor.shape[0] // 2
        parts = [tensor.rows(0, half), tensor.rows(half, 2 * half)]
    elif row.kind == "qkv":
        parts = [tensor.reorder_rows(indices) for indices in _qkv_rows(shape)]
    elif shape.rope_interleaved and row.megatron.endswith(
        ("q_layernorm.weight", "k_layernorm.weight")
    ):
        parts = [tensor.reorder_rows(_halves(shape.head_dim))]
    elif not tensor.shape:
        parts = [LazyTensor(row.shape, tensor.dtype, lambda: tensor.read().reshape(row.shape))]
    else:
        parts = [tensor]
    return list(zip(row.names, parts, strict=True))


def megatron_tensors(
    shape: Shape, weights: dict[str, LazyTensor], where: str
) -> tuple[int, list[tuple[str, LazyTensor]]]:
    """(rows of the embeddings, every tensor of Megatron) of the weights of a Hugging Face folder.

    Errors: PostTrainingError for a weight that is missing, of another size, in a dtype that needs
    scales, or without a place in Megatron.
    """
    embedding = next(rows(shape, 0)).names[0]
    if embedding not in weights:
        raise PostTrainingError(f"{embedding} is missing", where=where)
    vocabulary = weights[embedding].shape[0]
    found, read = [], set()
    for row in rows(shape, vocabulary):
        found.append((row.megatron, _to_megatron(row, _parts(row, weights, shape, where), shape)))
        read |= {*row.names}
    # xIELU's two are constants; a tied output layer is a copy of the embeddings.
    constants = {name for name in weights if name.endswith(("act_fn.beta", "act_fn.eps"))}
    tied = {"lm_head.weight"} if shape.tied else set()
    if unread := sorted(weights.keys() - read - constants - tied):
        raise PostTrainingError(
            f"{len(unread)} weights have no place in Megatron's {shape.family}: {unread[0]}, …",
            where=where,
        )
    return vocabulary, found


def _parts(row: Row, weights: dict[str, LazyTensor], shape: Shape, where: str) -> list[LazyTensor]:
    whole = LazyTensor(row.shape, torch.float32, lambda: torch.empty(row.shape))
    for name, expected in to_huggingface(row, whole, shape):
        if name not in weights:
            raise PostTrainingError(f"{name} is missing", where=where)
        if weights[name].shape != expected.shape:
            raise PostTrainingError(
                f"{name} is {list(weights[name].shape)}, must be {list(expected.shape)} by "
                "config.json",
                where=where,
            )
        check_dtype(name, weights[name], where)
    return [weights[name] for name in row.names]


def _to_megatron(row: Row, parts: list[LazyTensor], shape: Shape) -> LazyTensor:
    """The tensor of a row; parts: in the order of row.names."""
    if row.kind != "qkv":
        return concatenate(parts, 0)
    back = torch.argsort(torch.cat(_qkv_rows(shape)))
    return concatenate(parts, 0).reorder_rows(back)


def _qkv_rows(shape: Shape) -> list[torch.Tensor]:
    """Which rows of the fused tensor are q's, k's and v's."""
    per_group = shape.heads // shape.groups
    heads = torch.arange((shape.heads + 2 * shape.groups) * shape.head_dim).reshape(
        shape.groups, per_group + 2, shape.head_dim
    )
    if shape.rope_interleaved:
        order = _halves(shape.head_dim)
        heads[:, :-1] = heads[:, :-1][..., order]
    return [heads[:, :per_group].flatten(), heads[:, -2].flatten(), heads[:, -1].flatten()]


def _halves(head_dim: int) -> torch.Tensor:
    """0, 2, 4, … 1, 3, 5, …: neighbours become halves."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])


def check_dtype(name: str, tensor: LazyTensor, where: str) -> None:
    """Errors: PostTrainingError for a weight in 8 bits, or in integers: what it means is said
    elsewhere, by scales that are not read."""
    if tensor.dtype not in _DTYPES:
        found, known = (str(each).removeprefix("torch.") for each in (tensor.dtype, _DTYPES[0]))
        raise PostTrainingError(
            f"{name} is in {found}, must be in {known} or another of at least 16 bits", where=where
        )


def check_tensors(shape: Shape, tensors: dict[str, LazyTensor], where: str) -> None:
    """Errors: PostTrainingError for a tensor that is missing, of another size, foreign, or in a
    dtype that needs scales."""
    vocabulary = tensors.get("embedding.word_embeddings.weight")
    if vocabulary is None:
        raise PostTrainingError("embedding.word_embeddings.weight is missing", where=where)
    expected = {row.megatron: row for row in rows(shape, vocabulary.shape[0])}
    for name, row in expected.items():
        if name not in tensors:
            raise PostTrainingError(f"{name} is missing", where=where)
        # Old checkpoints of Apertus keep a number of xIELU without a dimension.
        if tensors[name].shape != row.shape and (tensors[name].shape, row.shape) != ((), (1,)):
            raise PostTrainingError(
                f"{name} is {list(tensors[name].shape)}, must be {list(row.shape)} by the settings",
                where=where,
            )
        check_dtype(name, tensors[name], where)
    # Pipeline stages of a tied model each have a copy of the embeddings.
    known = {*expected, "output_layer.weight"} if shape.tied else {*expected}
    if foreign := sorted(tensors.keys() - known):
        raise PostTrainingError(
            f"{len(foreign)} tensors do not belong to a {shape.family}: {foreign[0]}, …",
            where=where,
        )
