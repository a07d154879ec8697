# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The product of a few rows with int8 weights on a CPU. Letters as in quantized_grok1.py.
"""

import torch


# Rows times scale blocks up to which it is faster than dequantising: it converts the weight once for four rows.
INT8PACK_ROWS = 16
# Torch's int8 product reads 16 bytes at a time, from aligned addresses only.
INT8PACK_ALIGNMENT = 16
# Elements of an unaligned weight that are copied at a time: they fit into a core's second-level cache.
COPIED_ELEMENTS = 2**20


def can_int8pack(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `int8pack_matmul` takes these rows (S K) and is faster than dequantising."""
    few_rows = x.shape[0] * scale.shape[-1] <= INT8PACK_ROWS
    aligned = x.shape[1] % INT8PACK_ALIGNMENT == 0
    return few_rows and aligned and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def int8pack_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    x: S K, bfloat16, times the transpose of an int8 weight (N K; scale: N G) -> S N, bfloat16, by torch's
    `_weight_int8pack_mm`, which reads the int8 once and accumulates in float32. K must be a multiple of 16.
    """
    S, G = x.shape[0], scale.shape[-1]  # noqa: N806
    # Torch's kernel crashes where x or the weight is not aligned, and a memory-mapped weight begins at any address.
    if weight.data_ptr() % INT8PACK_ALIGNMENT != 0:
        rows = max(1, COPIED_ELEMENTS // weight.shape[1])
        parts = zip(weight.split(rows), scale.split(rows), strict=True)
        return torch.cat([int8pack_matmul(x, w.clone(), s) for w, s in parts], dim=-1)
    if G == 1:
        x = x.contiguous() if x.data_ptr() % INT8PACK_ALIGNMENT == 0 else x.clone()
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale.squeeze(-1))
    # Torch's kernel knows one scale per output only: one row per block, which is zero outside of the block.
    blocks = x.unflatten(-1, (G, -1))  # S G K/G
    blocks = torch.diag_embed(blocks.transpose(1, 2)).permute(0, 3, 2, 1).reshape(S * G, -1)
    sums = torch.ops.aten._weight_int8pack_mm(blocks, weight, scale.new_ones(weight.shape[0]))
    return (sums.view(S, G, -1).float() * scale.T.float()).sum(dim=1).to(x.dtype)
