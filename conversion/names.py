"""THE table: every kind of tensor of Grok-1, by its name in xAI's checkpoint and in each layout of the hub.

Shapes are spelled in the symbols of the config:

    V vocab_size   D hidden_size   F intermediate_size   E num_experts
    Q num_attention_heads * head_dim   KV num_key_value_heads * head_dim

xAI stores a matrix (in, out), torch stores it (out, in): kinds that are `transposed` are transposed by the converter.
Read from left to right the table says what the converter writes, from right to left what `grok1 export-xai` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from grok1.errors import ConversionError
from grok1.files import array_bytes


SAFETENSORS_LAYOUTS = ("hub", "fused", "hpcai", "keyfan")
LAYOUTS = (*SAFETENSORS_LAYOUTS, "gguf")
DTYPES = ("bfloat16", "float32", "int8", "int4")
BITS = {"int8": 8, "int4": 4}  # the precisions that are packed (modeling_grok1/packing_grok1.py)
BLOCK_TYPES = {"int8": "q8_0", "int4": "q4_0"}  # how GGUF stores them (grok1/gguf_files.py)


class GrokSizes(Protocol):
    """What the table needs of a config; GrokConfig has all of it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int


@dataclass(frozen=True)
class Kind:
    """One row: a kind of tensor.

    Args:
        name: of the kind, in messages and tables.
        path: xAI's parameter path, below `transformer/decoder_layer_N/` for the kinds of a block.
        shape: as xAI stores it, in the symbols above.
        transposed: whether the last two axes are swapped in every hub layout.
        scale_blocks: row blocks with a scale of their own in the release; 0 if the tensor is not quantised.
        hub, hpcai, keyfan, gguf: names in the layouts; `{e}` is the expert. In GGUF the experts of a layer are one
            tensor.
        fused: name in the fused layout where it differs from `hub`; kinds that share one are concatenated row-wise in
            table order, for each expert.
    """

    name: str
    path: str
    shape: tuple[str, ...]
    transposed: bool
    scale_blocks: int
    hub: str
    hpcai: str
    keyfan: str
    gguf: str
    fused: str = ""

    @property
    def quantised(self) -> bool:
        return self.scale_blocks > 0


# fmt: off
TOP_KINDS = (
    Kind("embedding", "language_model/in_out_embed/embeddings", ("V", "D"), False, 0,
         "model.embed_tokens.weight", "model.embed_tokens.weight", "transformer.in_out_embed.weight",
         "token_embd.weight"),
    Kind("norm_final", "language_model/rms_norm/scale", ("D",), False, 0,
         "model.norm.weight", "model.norm.scale", "transformer.rms_norm.weight", "output_norm.weight"),
)

# The twelve tensors of a block, in the order of the checkpoint.
BLOCK_KINDS = (
    Kind("moe_gate", "moe/linear/w", ("E", "D", "F"), True, 1,
         "block_sparse_moe.experts.{e}.w1.weight", "moe_block.experts.{e}.linear.weight", "moe.{e}.linear.weight",
         "ffn_gate_exps.weight", "block_sparse_moe.experts.gate_up_proj"),
    Kind("moe_down", "moe/linear_1/w", ("E", "F", "D"), True, 8,
         "block_sparse_moe.experts.{e}.w2.weight", "moe_block.experts.{e}.linear_1.weight", "moe.{e}.linear_1.weight",
         "ffn_down_exps.weight", "block_sparse_moe.experts.down_proj"),
    Kind("moe_up", "moe/linear_v/w", ("E", "D", "F"), True, 1,
         "block_sparse_moe.experts.{e}.w3.weight", "moe_block.experts.{e}.linear_v.weight", "moe.{e}.linear_v.weight",
         "ffn_up_exps.weight", "block_sparse_moe.experts.gate_up_proj"),
    Kind("attn_k", "multi_head_attention/key/w", ("D", "KV"), True, 1,
         "self_attn.k_proj.weight", "attn.k_proj.weight", "multi_head_attention.key.weight", "attn_k.weight"),
    Kind("attn_o", "multi_head_attention/linear/w", ("Q", "D"), True, 8,
         "self_attn.o_proj.weight", "attn.o_proj.weight", "multi_head_attention.linear.weight", "attn_output.weight"),
    Kind("attn_q", "multi_head_attention/query/w", ("D", "Q"), True, 1,
         "self_attn.q_proj.weight", "attn.q_proj.weight", "multi_head_attention.query.weight", "attn_q.weight"),
    Kind("attn_v", "multi_head_attention/value/w", ("D", "KV"), True, 1,
         "self_attn.v_proj.weight", "attn.v_proj.weight", "multi_head_attention.value.weight", "attn_v.weight"),
    Kind("norm_pre_attn", "rms_norm/scale", ("D",), False, 0,
         "pre_attn_norm.weight", "pre_attn_norm.scale", "rms_norm.weight", "attn_norm.weight"),
    Kind("norm_post_attn", "rms_norm_1/scale", ("D",), False, 0,
         "post_attn_norm.weight", "post_attn_norm.scale", "rms_norm_1.weight", "attn_output_norm.weight"),
    Kind("norm_pre_moe", "rms_norm_2/scale", ("D",), False, 0,
         "pre_moe_norm.weight", "pre_moe_norm.scale", "rms_norm_2.weight", "ffn_norm.weight"),
    Kind("norm_post_moe", "rms_norm_3/scale", ("D",), False, 0,
         "post_moe_norm.weight", "post_moe_norm.scale", "rms_norm_3.weight", "post_ffw_norm.weight"),
    Kind("router", "router/w", ("D", "E"), True, 0,
         "block_sparse_moe.gate.weight", "moe_block.gate.weight", "router.weight", "ffn_gate_inp.weight"),
)
# fmt: on

KINDS = {kind.name: kind for kind in (*TOP_KINDS, *BLOCK_KINDS)}
HEAD_NAME = "lm_head.weight"
# The release has 64 layers of 8 experts.
MAX_LAYERS, MAX_EXPERTS = 4096, 2**17
LAYER_PREFIX = {
    "hub": "model.layers.{n}.",
    "fused": "model.layers.{n}.",
    "hpcai": "model.layers.{n}.",
    "keyfan": "transformer.decoder_layer.{n}.",
    "gguf": "blk.{n}.",
}


@dataclass(frozen=True)
class Entry:
    """One file of the checkpoint: `shape` and `dtype` are those of its weight, as stored."""

    index: int
    file: str
    path: str
    layer: int | None
    kind: Kind
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Literal["int8", "float32"]:
        return "int8" if self.kind.quantised else "float32"

    def scales_shape(self, blocks: int) -> tuple[int, ...]:
        """The shape of the scales for a number of row blocks: `blocks` in place of the input axis."""
        return (*self.shape[:-2], blocks, self.shape[-1])


@dataclass(frozen=True)
class Part:
    """One matrix (or vector) of a source file, and the element of the output tensor at which it begins.

    `field` says which array of the file it is: the weight, or the scales (of an int8 output). `expert` is the index on
    the leading axis of an expert file, else None. Transposed if the kind says so, a part is contiguous in the output.
    The field "shape" is the shape of the matrix, which is in no array.
    """

    entry: Entry
    expert: int | None
    field: Literal["weight", "scales", "shape"]
    offset: int


@dataclass(frozen=True)
class Packing:
    """How a quantised matrix is stored: `bits` per value, a scale for each `group_size` inputs."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class HubTensor:
    """One tensor of a converted folder, and the parts that it is made of, in order.

    `dtype` is as torch spells it, or a block type of GGUF. `packing`: of a packed matrix.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]
    packing: Packing | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return array_bytes(self.dtype, self.numel)

    @property
    def parameters(self) -> int:
        """Weights of the model: those packed in the integers, none in scales, shapes and the copy of the head."""
        if self.name == HEAD_NAME or self.parts[0].field != "weight":
            return 0
        return self.numel * (32 // self.packing.bits if self.packing else 1)


def xai_layer_order(num_layers: int) -> list[int]:
    """The layers in the order of the checkpoint's files: lexicographic, 0, 1, 10, 11, ..., 19, 2, 20, ..."""
    return sorted(range(num_layers), key=str)


def checkpoint_entries(config: GrokSizes) -> list[Entry]:
    """Every file of a checkpoint of these sizes, in the order of its index (the release: 770)."""
    _check_sizes(config)
    sizes = _sizes(config)
    rows: list[tuple[int | None, Kind]] = [(None, kind) for kind in TOP_KINDS]
    rows += [(layer, kind) for layer in xai_layer_order(config.num_hidden_layers) for kind in BLOCK_KINDS]
    return [
        Entry(
            index=index,
            file=f"tensor{index:05d}_000",
            path=kind.path if layer is None else f"transformer/decoder_layer_{layer}/{kind.path}",
            layer=layer,
            kind=kind,
            shape=tuple(sizes[symbol] for symbol in kind.shape),
        )
        for index, (layer, kind) in enumerate(rows)
    ]


def _check_sizes(config: GrokSizes) -> None:
    """Raises ConversionError for a config with an implausible number of tensors, before their names are generated."""
    layers, experts = config.num_hidden_layers, max(1, config.num_experts)
    if layers > MAX_LAYERS or layers * experts > MAX_EXPERTS:
        raise ConversionError(
            f"expected at most {MAX_LAYERS:,} layers and {MAX_EXPERTS:,} experts in all, found {layers:,} layers "
            f"of {experts:,} experts"
        )


def hub_tensors(
    config: GrokSizes,
    layout: str = "hub",
    dtype: str = "bfloat16",
    group_size: int = 128,
    embedding: str | None = None,
) -> dict[str, HubTensor]:
    """Every tensor of a converted folder by its name, in the order in which the shards hold them.

    The order is the embedding, the head, the layers 0, 1, 2, ... (names sorted inside a layer), the final norm.
    llama.cpp's converter can read it with shards of any size: it merges the experts of a layer at the next tensor that
    is not an expert, silently drops them if there is none, and fails if that tensor is not a layer's. The header of a
    shard is sorted, so a head after the layers would come before their last experts.

    Norms and routers are float32 in every precision. `int8` and `int4` store each quantised matrix as
    `X.weight_packed`, `X.weight_scale` and `X.weight_shape` (modeling_grok1/packing_grok1.py), keep the embedding
    float32 and write no head: it is tied. GGUF stores them in its own blocks of 32 values and a scale, and writes no
    head in any precision.

    Args:
        config: the sizes of the model.
        layout: "hub", "fused", "hpcai", "keyfan" or "gguf"; packed precisions are in "hub" and "gguf" only.
        dtype: "bfloat16", "float32", "int8" or "int4".
        group_size: inputs per scale, for packed precisions in "hub".
        embedding: in "gguf", the embedding's dtype: "float32", "bfloat16" or "q8_0"; by default as in the other
            layouts.
    """
    entries = checkpoint_entries(config)
    packing = Packing(BITS[dtype], group_size) if dtype in BITS and layout != "gguf" else None
    layers: dict[int, list[Entry]] = {layer: [] for layer in range(config.num_hidden_layers)}
    for entry in entries[len(TOP_KINDS) :]:
        assert entry.layer is not None
        layers[entry.layer].append(entry)

    first, norm = entries[: len(TOP_KINDS)]
    tensors = _named(first, layout, embedding or ("float32" if dtype in BITS else dtype), packing)
    if packing is None and layout != "gguf":
        tensors += [HubTensor(HEAD_NAME, t.shape, t.dtype, t.parts) for t in tensors]
    for block in layers.values():
        named = [tensor for entry in block for tensor in _named(entry, layout, dtype, packing)]
        tensors += sorted(_joined(named), key=lambda tensor: tensor.name)
    tensors += _named(norm, layout, dtype, packing)
    return {tensor.name: tensor for tensor in tensors}


def parts_by_entry(tensors: Iterable[HubTensor]) -> dict[int, list[tuple[HubTensor, Part]]]:
    """The table read backwards: by file index, where its arrays lie in the folder (the head's copy left out)."""
    found: dict[int, list[tuple[HubTensor, Part]]] = {}
    for tensor in tensors:
        if tensor.name != HEAD_NAME:
            for part in tensor.parts:
                found.setdefault(part.entry.index, []).append((tensor, part))
    return found


def _sizes(config: GrokSizes) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "E": config.num_experts,
        "Q": config.num_attention_heads * config.head_dim,
        "KV": config.num_key_value_heads * config.head_dim,
    }


def _named(entry: Entry, layout: str, dtype: str, packing: Packing | None) -> list[HubTensor]:
    """The tensors of one file under their names; gate and up of the fused layout are still apart (see `_joined`)."""
    kind = entry.kind
    name = (kind.fused or kind.hub) if layout == "fused" else getattr(kind, layout)
    if entry.layer is not None:
        name = LAYER_PREFIX[layout].format(n=entry.layer) + name
    if packing is not None:
        return _packed(entry, name, packing) if kind.quantised else _arrays(entry, name, entry.dtype, layout)
    if not kind.quantised and kind.name != "embedding":
        dtype = "float32"
    return _arrays(entry, name, BLOCK_TYPES.get(dtype, dtype), layout)


def _packed(entry: Entry, name: str, packing: Packing) -> list[HubTensor]:
    """The three tensors of each matrix of a file."""
    inputs, outputs = entry.shape[-2:]
    experts: Iterable[int | None] = range(entry.shape[0]) if entry.kind.shape[0] == "E" else [None]
    tensors = []
    for e in experts:
        matrix = name.format(e=e)
        packed, groups = (outputs, inputs * packing.bits // 32), (outputs, inputs // packing.group_size)
        tensors += [
            HubTensor(f"{matrix}_packed", packed, "int32", (Part(entry, e, "weight", 0),), packing),
            HubTensor(f"{matrix}_scale", groups, "bfloat16", (Part(entry, e, "scales", 0),), packing),
            HubTensor(f"{matrix}_shape", (2,), "int64", (Part(entry, e, "shape", 0),), packing),
        ]
    return tensors


def _arrays(entry: Entry, name: str, dtype: str, layout: str) -> list[HubTensor]:
    """The weight of a file as a tensor, or as one tensor for each expert in the layouts that keep them apart."""
    shape = entry.shape
    matrix = shape[-2:]
    turned = matrix[::-1] if entry.kind.transposed else matrix
    if entry.kind.shape[0] != "E":
        return [HubTensor(name, turned, dtype, (Part(entry, None, "weight", 0),))]
    experts = range(shape[0])
    if layout in ("fused", "gguf"):
        parts = tuple(Part(entry, e, "weight", e * math.prod(matrix)) for e in experts)
        return [HubTensor(name, (len(experts), *turned), dtype, parts)]
    return [HubTensor(name.format(e=e), turned, dtype, (Part(entry, e, "weight", 0),)) for e in experts]


def _joined(tensors: list[HubTensor]) -> list[HubTensor]:
    """Tensors of the same name as one, row-wise for each expert: gate (E, F, D) and up (E, F, D) as (E, 2F, D)."""
    by_name: dict[str, list[HubTensor]] = {}
    for tensor in tensors:
        by_name.setdefault(tensor.name, []).append(tensor)
    joined = []
    for name, same in by_name.items():
        if len(same) == 1:
            joined += same
            continue
        experts, _, columns = same[0].shape
        shape = (experts, sum(tensor.shape[1] for tensor in same), columns)
        parts = []
        for e in range(experts):
            offset = e * shape[1] * columns
            for tensor in same:
                part = tensor.parts[e]
                parts.append(Part(part.entry, part.expert, part.field, offset))
                offset += tensor.shape[1] * columns
        joined.append(HubTensor(name, shape, same[0].dtype, tuple(parts)))
    return joined
