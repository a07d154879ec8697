# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The `pack-quantized` format of the compressed-tensors library (https://github.com/vllm-project/compressed-tensors) with
weights of 8 and 4 bits, W8A16 and W4A16, and how weights are quantised for it. vLLM, SGLang, llama.cpp's converter and
MLX read it. For a matrix of N outputs and K inputs:

    weight_packed  N K*bits/32, int32     value + 2^(bits - 1), 4 or 8 to an integer, the first in the lowest bits
    weight_scale   N K/group, bfloat16    dequantised[n, k] = value[n, k] * scale[n, k // group]
    weight_shape   2, int64               N, K
"""

import sys
from typing import Any

import torch


GROUP_SIZES = (128, 64, 32)  # those that vLLM's and MLX's kernels have
FORMAT = "pack-quantized"
LIBRARY = "compressed-tensors"
NOT_QUANTISED = ["lm_head", r"re:.*block_sparse_moe\.gate$"]

# Elements that are quantised at a time: the search for scales holds some copies of them in float32.
QUANTISED_ELEMENTS = 2**20


# --------------------------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------------------------
def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values: ... K, int8, each of `bits` bits (8 or 4) -> ... K*bits/32, int32."""
    assert sys.byteorder == "little", "the bytes of an integer are taken in the order of their bits"
    if bits == 8:
        return (values ^ -128).contiguous().view(torch.int32)
    nibbles = (values + 8).view(torch.uint8).unflatten(-1, (-1, 2))
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """The reverse of `pack`: ... K*bits/32, int32 -> ... K, int8. `out`, for 8 bits: where to write it; may be
    `packed.view(torch.int8)`."""
    if bits == 8:
        return torch.bitwise_xor(packed.contiguous().view(torch.int8), -128, out=out)
    octets = packed.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2).view(torch.int8) - 8


def repeat_scales(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """scale: ... G, one for each of G contiguous blocks of inputs -> ... `groups`, the same for smaller groups."""
    return scale.repeat_interleave(groups // scale.shape[-1], dim=-1)


def merge_scales(scale: torch.Tensor) -> torch.Tensor:
    """The reverse of `repeat_scales`: the fewest blocks that have one scale each in every row."""
    groups = scale.shape[-1]
    for blocks in range(1, groups):
        if groups % blocks == 0:
            grouped = scale.unflatten(-1, (blocks, -1))
            if bool((grouped == grouped[..., :1]).all()):
                return grouped[..., 0].contiguous()
    return scale


# --------------------------------------------------------------------------------------------------------------------
# Quantising
# --------------------------------------------------------------------------------------------------------------------
def quantise_int8(weight: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    weight: ... K, floating -> int8 ... K and its bfloat16 scales ... G, max/127 of each of G = `blocks` blocks.

    The scale is rounded to nearest. Its relative error is below 2^-8, so the largest quotient is below 127.5 and no
    value is clipped; and weights that were dequantised in bfloat16 come back as they were.
    """
    grouped = weight.float().unflatten(-1, (blocks, -1))
    scale = (grouped.abs().amax(dim=-1) / 127).to(torch.bfloat16)
    steps = scale.float().unsqueeze(-1)
    values = torch.where(steps > 0, grouped / steps, 0.0).round_()
    return values.to(torch.int8).flatten(-2), scale


def quantise_int4(
    weight: torch.Tensor, group_size: int, scale_search: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Round to 4 bits, symmetric: ... K, floating -> int8 ... K, from -8 to 7, and bfloat16 scales ... K/group_size.

    Args:
        scale_search: choose each scale by the squared error of its group; see `search_scales`. False: round to nearest
            with the scale max|w| / 7.5.
    """
    matrix = weight.reshape(-1, group_size)
    values = torch.empty(matrix.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(matrix), dtype=torch.bfloat16, device=weight.device)
    rows = max(1, QUANTISED_ELEMENTS // group_size)
    for start in range(0, len(matrix), rows):
        part = slice(start, start + rows)
        groups = matrix[part].float()
        found = search_scales(groups) if scale_search else (groups.abs().amax(dim=-1) / 7.5).to(torch.bfloat16)
        scales[part], values[part] = found, rounded(groups, found.float()).to(torch.int8)
    return values.view(weight.shape), scales.view(*weight.shape[:-1], -1)


def rounded(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """groups: n g; scale: n -> the nearest of the 16 values, n g; 0 where the scale is 0."""
    steps = scale.unsqueeze(-1)
    return torch.where(steps != 0, groups / steps, 0.0).round_().clamp_(-8, 7)


def search_scales(groups: torch.Tensor) -> torch.Tensor:
    """
    The scale of each group (n g, float32) with the least squared error among 26 candidates and their refinements.

    The candidates place the weight of the largest magnitude at -8.9 to -6.4: its sign is the scale's, because there is
    one more negative value than positive ones (as in llama.cpp's Q4_0), and clipping it may help the others. Given the
    rounded values q, the best scale is <w, q> / <q, q>; rounding with that one and again lowers the error further.
    """
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    best = torch.zeros_like(largest, dtype=torch.bfloat16)
    least = torch.full_like(largest, float("inf"))
    for tenths in range(64, 90):
        candidate = largest / (-tenths / 10)
        for _ in range(2):
            scale = candidate.to(torch.bfloat16)
            q = rounded(groups, scale.float())
            error = (groups - q * scale.float().unsqueeze(-1)).square_().sum(dim=-1)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
            candidate = (groups * q).sum(dim=-1) / q.square().sum(dim=-1).clamp_(min=1)
    return best


# --------------------------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------------------------
def quantization_dict(bits: int, group_size: int) -> dict[str, Any]:
    """The `quantization_config` of config.json that engines read."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    scheme = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}}
    return {
        "quant_method": LIBRARY,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "input_activations": None, "output_activations": None}},
        "ignore": list(NOT_QUANTISED),
        "kv_cache_scheme": None,
    }


def bits_and_group_size(quantization: Any) -> tuple[int, int] | None:
    """The weights' bits and group size of such a `quantization_config`; None for another method or scheme."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") != LIBRARY:
        return None
    groups = list((quantization.get("config_groups") or {}).values())
    if quantization.get("format") != FORMAT or quantization.get("kv_cache_scheme") or len(groups) != 1:
        return None
    scheme = groups[0]
    weights = scheme.get("weights") or {}
    known = {"type": "int", "symmetric": True, "strategy": "group"}
    plain = (
        not scheme.get("input_activations") and not scheme.get("output_activations") and not weights.get("actorder")
    )
    if not plain or scheme.get("targets") != ["Linear"] or any(weights.get(key) != known[key] for key in known):
        return None
    bits, group_size = weights.get("num_bits"), weights.get("group_size")
    return (bits, group_size) if bits in (4, 8) and isinstance(group_size, int) and group_size > 0 else None
