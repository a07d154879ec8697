"""The table of names: the 770 files of the release on one side, every name that other engines know on the other."""

import json
import math

import pytest

from grok1.conversion.names import (
    BITS,
    BLOCK_KINDS,
    DTYPES,
    LAYOUTS,
    checkpoint_entries,
    hub_tensors,
    parts_by_entry,
    xai_layer_order,
)
from grok1.conversion.release import release_sizes


V, D, H, KV, E, F, LAYERS = 131072, 6144, 6144, 1024, 8, 32768, 64

# The names of one layer as each repository has them, with their shapes: (out, in).
ATTENTION = {"q": (H, D), "k": (KV, D), "v": (KV, D), "o": (D, H)}
EXPERT = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
OTHERS_EXPERT = {"linear": (F, D), "linear_1": (D, F), "linear_v": (F, D)}
NORMS = ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm")


def hub_layer(n: int) -> dict[str, tuple[int, ...]]:
    p = f"model.layers.{n}."
    return {
        **{f"{p}self_attn.{x}_proj.weight": shape for x, shape in ATTENTION.items()},
        **{f"{p}block_sparse_moe.experts.{e}.{w}.weight": s for e in range(E) for w, s in EXPERT.items()},
        **{f"{p}{norm}.weight": (D,) for norm in NORMS},
        f"{p}block_sparse_moe.gate.weight": (E, D),
    }


def fused_layer(n: int) -> dict[str, tuple[int, ...]]:
    experts = f"model.layers.{n}.block_sparse_moe.experts."
    kept = {name: shape for name, shape in hub_layer(n).items() if not name.startswith(experts)}
    return {**kept, f"{experts}gate_up_proj": (E, 2 * F, D), f"{experts}down_proj": (E, D, F)}


def hpcai_layer(n: int) -> dict[str, tuple[int, ...]]:
    p = f"model.layers.{n}."
    return {
        **{f"{p}attn.{x}_proj.weight": shape for x, shape in ATTENTION.items()},
        **{f"{p}moe_block.experts.{e}.{w}.weight": s for e in range(E) for w, s in OTHERS_EXPERT.items()},
        **{f"{p}{norm}.scale": (D,) for norm in NORMS},
        f"{p}moe_block.gate.weight": (E, D),
    }


def keyfan_layer(n: int) -> dict[str, tuple[int, ...]]:
    p = f"transformer.decoder_layer.{n}."
    attention = {"query": "q", "key": "k", "value": "v", "linear": "o"}
    return {
        **{f"{p}multi_head_attention.{name}.weight": ATTENTION[x] for name, x in attention.items()},
        **{f"{p}moe.{e}.{w}.weight": s for e in range(E) for w, s in OTHERS_EXPERT.items()},
        **{f"{p}{norm}.weight": (D,) for norm in ("rms_norm", "rms_norm_1", "rms_norm_2", "rms_norm_3")},
        f"{p}router.weight": (E, D),
    }


def gguf_layer(n: int) -> dict[str, tuple[int, ...]]:
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    experts = {"ffn_gate_exps": (E, F, D), "ffn_down_exps": (E, D, F), "ffn_up_exps": (E, F, D)}
    norms = ("attn_norm", "attn_output_norm", "ffn_norm", "post_ffw_norm")
    return {
        **{f"blk.{n}.{name}.weight": ATTENTION[x] for x, name in names.items()},
        **{f"blk.{n}.{name}.weight": shape for name, shape in experts.items()},
        **{f"blk.{n}.{norm}.weight": (D,) for norm in norms},
        f"blk.{n}.ffn_gate_inp.weight": (E, D),
    }


EXPECTED = {
    "hub": ("model.embed_tokens.weight", "model.norm.weight", hub_layer),
    "fused": ("model.embed_tokens.weight", "model.norm.weight", fused_layer),
    "hpcai": ("model.embed_tokens.weight", "model.norm.scale", hpcai_layer),
    "keyfan": ("transformer.in_out_embed.weight", "transformer.rms_norm.weight", keyfan_layer),
    "gguf": ("token_embd.weight", "output_norm.weight", gguf_layer),
}


def test_the_entries_are_the_published_index(assets):
    rows = [json.loads(line) for line in (assets / "checkpoint-index.jsonl").read_text().splitlines()]
    entries = checkpoint_entries(release_sizes())
    assert len(rows) == len(entries) == 770
    for entry, row in zip(entries, rows, strict=True):
        found = (entry.index, entry.file, entry.path, entry.layer, entry.kind.name, list(entry.shape), entry.dtype)
        assert found == tuple(
            row[key] for key in ("index", "file", "path", "layer", "kind", "weight_shape", "weight_dtype")
        )
        blocks = entry.kind.scale_blocks
        assert (list(entry.scales_shape(blocks)) if blocks else None) == row["scales_shape"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_names_and_shapes_of_a_layout(layout):
    embedding, norm, layer = EXPECTED[layout]
    head = {} if layout == "gguf" else {"lm_head.weight": (V, D)}
    expected = {embedding: (V, D), norm: (D,), **head}
    for n in range(LAYERS):
        expected |= layer(n)
    for dtype in ("bfloat16", "float32"):
        tensors = hub_tensors(release_sizes(), layout, dtype)
        assert {name: tensor.shape for name, tensor in tensors.items()} == expected
        in_float32 = {name for name, tensor in tensors.items() if tensor.dtype == "float32"}
        routers = ("router.weight", ".gate.weight", "ffn_gate_inp.weight")
        small = {name for name in expected if "norm" in name or name.endswith(routers)}
        assert in_float32 == (set(expected) if dtype == "float32" else small)
        assert sum(tensor.numel for tensor in tensors.values()) == 316_490_127_360 - (V * D if not head else 0)


@pytest.mark.parametrize(("dtype", "per_word"), [("int8", 4), ("int4", 8)])
@pytest.mark.parametrize("group_size", [128, 32])
def test_packed_precisions_have_three_tensors_per_matrix_and_no_head(dtype, per_word, group_size):
    plain, packed = hub_tensors(release_sizes()), hub_tensors(release_sizes(), dtype=dtype, group_size=group_size)
    quantised = {name.removesuffix("_packed") for name in packed if name.endswith("_packed")}
    assert len(quantised) == LAYERS * (4 + 3 * E)
    assert {name.removesuffix("_packed") for name in packed if not name.endswith(("_scale", "_shape"))} == (
        plain.keys() - {"lm_head.weight"}
    )
    for name in quantised:
        outputs, inputs = plain[name].shape
        assert packed[f"{name}_packed"].shape == (outputs, inputs // per_word)
        assert packed[f"{name}_scale"].shape == (outputs, inputs // group_size)
        assert packed[f"{name}_shape"].shape == (2,)
        found = [packed[f"{name}_{part}"].dtype for part in ("packed", "scale", "shape")]
        assert found == ["int32", "bfloat16", "int64"]
    assert packed["model.embed_tokens.weight"].dtype == "float32"
    assert sum(tensor.parameters for tensor in packed.values()) == 315_684_820_992


def test_layers_are_lexicographic_on_xais_side_and_numeric_on_the_hubs():
    order = xai_layer_order(64)
    assert order[:13] == [0, 1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 2]
    assert order[-5:] == [62, 63, 7, 8, 9]
    names = list(hub_tensors(release_sizes()))
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    assert names[:2] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert names[-1] == "model.norm.weight"


PLACES = [(layout, dtype) for layout in LAYOUTS for dtype in DTYPES if layout in ("hub", "gguf") or dtype not in BITS]


@pytest.mark.parametrize(("layout", "dtype"), PLACES)
def test_every_array_of_the_checkpoint_has_exactly_one_place(layout, dtype):
    tensors = hub_tensors(release_sizes(), layout, dtype)
    places = parts_by_entry(tensors.values())
    for entry in checkpoint_entries(release_sizes()):
        experts = range(8) if entry.kind.name.startswith("moe_") else [None]
        packed = dtype in BITS and layout == "hub" and entry.kind.quantised
        fields = ["weight", "scales", "shape"] if packed else ["weight"]
        found = [(part.field, part.expert) for _, part in places[entry.index]]
        assert sorted(found, key=str) == sorted(((f, e) for f in fields for e in experts), key=str)
    for tensor in tensors.values():
        if tensor.packing is not None:
            assert [part.offset for part in tensor.parts] == [0]
            continue
        # The parts of a tensor follow each other without a gap.
        position = 0
        for part in tensor.parts:
            assert part.offset == position
            position += math.prod(part.entry.shape[-2:] if part.expert is not None else part.entry.shape)
        assert position == tensor.numel


def test_gate_comes_before_up_in_the_fused_matrix():
    tensor = hub_tensors(release_sizes(), "fused")["model.layers.0.block_sparse_moe.experts.gate_up_proj"]
    assert [(part.entry.kind.name, part.expert) for part in tensor.parts[:4]] == [
        ("moe_gate", 0),
        ("moe_up", 0),
        ("moe_gate", 1),
        ("moe_up", 1),
    ]


def test_a_kind_is_named_once_in_every_column():
    for column in ("name", "path", "hub", "hpcai", "keyfan", "gguf"):
        values = [getattr(kind, column) for kind in BLOCK_KINDS]
        assert len(set(values)) == len(values) == 12
