"""The conversion as one would write it in an afternoon: everything in memory, plain numpy, names spelled out.

It shares no code with the converter. Python's unpickler reads the files, `about.json` tells which is which.
"""

import json
from pathlib import Path

import numpy as np
from xai_files import unpickled


DTYPES = {"float32": "<f4", "int8": "i1", "bfloat16": "<u2"}
GROUP_SIZES = {"tiny-1": 16, "tiny-8": 2}  # of int8 conversions: they divide every scale block

HUB = {
    "moe/linear/w": "block_sparse_moe.experts.{e}.w1.weight",
    "moe/linear_v/w": "block_sparse_moe.experts.{e}.w3.weight",
    "moe/linear_1/w": "block_sparse_moe.experts.{e}.w2.weight",
    "multi_head_attention/query/w": "self_attn.q_proj.weight",
    "multi_head_attention/key/w": "self_attn.k_proj.weight",
    "multi_head_attention/value/w": "self_attn.v_proj.weight",
    "multi_head_attention/linear/w": "self_attn.o_proj.weight",
    "rms_norm/scale": "pre_attn_norm.weight",
    "rms_norm_1/scale": "post_attn_norm.weight",
    "rms_norm_2/scale": "pre_moe_norm.weight",
    "rms_norm_3/scale": "post_moe_norm.weight",
    "router/w": "block_sparse_moe.gate.weight",
}
HPCAI = [
    (".self_attn.", ".attn."),
    (".block_sparse_moe.", ".moe_block."),
    (".w1.", ".linear."),
    (".w2.", ".linear_1."),
    (".w3.", ".linear_v."),
    ("norm.weight", "norm.scale"),
]
KEYFAN = [
    ("model.embed_tokens.", "transformer.in_out_embed."),
    ("model.norm.", "transformer.rms_norm."),
    ("model.layers.", "transformer.decoder_layer."),
    (".self_attn.q_proj.", ".multi_head_attention.query."),
    (".self_attn.k_proj.", ".multi_head_attention.key."),
    (".self_attn.v_proj.", ".multi_head_attention.value."),
    (".self_attn.o_proj.", ".multi_head_attention.linear."),
    (".block_sparse_moe.gate.", ".router."),
    (".block_sparse_moe.experts.", ".moe."),
    (".w1.", ".linear."),
    (".w2.", ".linear_1."),
    (".w3.", ".linear_v."),
    (".pre_attn_norm.", ".rms_norm."),
    (".post_attn_norm.", ".rms_norm_1."),
    (".pre_moe_norm.", ".rms_norm_2."),
    (".post_moe_norm.", ".rms_norm_3."),
]


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 rounded to nearest even, as the upper 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def float32_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def naive_tensors(checkpoint: Path, dtype: str, layout: str) -> dict[str, np.ndarray]:
    """Every tensor of the converted folder; bfloat16 as its bits in uint16."""
    tensors: dict[str, np.ndarray] = {}
    paths = json.loads((checkpoint / "about.json").read_text())["paths"]
    for index, path in enumerate(paths):
        data = (checkpoint / "ckpt-0" / f"tensor{index:05d}_000").read_bytes()
        arrays = [np.frombuffer(raw, DTYPES[kind]).reshape(shape) for kind, shape, raw in unpickled(data)]
        if path == "language_model/in_out_embed/embeddings":
            tensors["model.embed_tokens.weight"] = arrays[0] if dtype != "bfloat16" else bfloat16_bits(arrays[0])
            if dtype != "int8":
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            continue
        if path == "language_model/rms_norm/scale":
            tensors["model.norm.weight"] = arrays[0]
            continue
        _, layer, kind = path.split("/", 2)
        name = f"model.layers.{layer.removeprefix('decoder_layer_')}.{HUB[kind]}"
        if len(arrays) == 1:
            tensors[name] = arrays[0].T
            continue
        weight, scales = arrays
        if dtype == "int8":
            repeats = weight.shape[-2] // scales.shape[-2] // GROUP_SIZES[checkpoint.name]
            outputs = {name: weight, f"{name}_scale": np.repeat(scales, repeats, axis=-2)}
        else:
            blocks, rows = scales.shape[-2], weight.shape[-2]
            wide = np.stack([float32_of(scales[..., r * blocks // rows, :]) for r in range(rows)], axis=-2)
            product = weight.astype(np.float32) * wide
            outputs = {name: product if dtype == "float32" else bfloat16_bits(product)}
        for key, value in outputs.items():
            if value.ndim == 2:
                tensors[key] = value.T
            else:
                tensors |= {key.format(e=e): value[e].T for e in range(len(value))}
    if dtype == "int8":
        return _packed(tensors)
    if layout == "fused":
        return _fused(tensors)
    for old, new in {"hub": [], "hpcai": HPCAI, "keyfan": KEYFAN}[layout]:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


def _packed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The int8 values + 128 as the bytes of little-endian integers, and the shapes."""
    packed = {}
    for name, value in tensors.items():
        if value.dtype != np.int8:
            packed[name] = value
            continue
        offset = (np.ascontiguousarray(value).astype(np.int16) + 128).astype(np.uint8)
        packed[f"{name}_packed"] = offset.view("<i4")
        packed[f"{name}_shape"] = np.array(value.shape, np.int64)
    return packed


def _fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    layers = {name.split("experts.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        for suffix in ("weight", "weight_scale"):
            gate, down, up = (
                [tensors[key] for e in range(99) if (key := f"{layer}experts.{e}.{w}.{suffix}") in tensors]
                for w in ("w1", "w2", "w3")
            )
            if gate:
                end = suffix.removeprefix("weight")
                kept[f"{layer}experts.gate_up_proj{end}"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
                kept[f"{layer}experts.down_proj{end}"] = np.stack(down)
    return kept
