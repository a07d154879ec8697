# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The matrix product of decoding: one row for each matrix, so that it costs what reading the matrix costs.
"""

import torch


def reduced_matmul(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Each row times the transpose of the matrix of its expert, as one multiply-and-reduce. Only torch.compile makes it
    fast: then it reads the weights where they lie, at the speed of the memory, where torch's own products of one row
    reach half of it.

    Args:
        x: S K.
        weight: E N K, floating or int8.
        experts: S, the matrix of each row.
        scale: E N G, the scales of an int8 weight, one for each of G contiguous blocks of inputs.

    Returns:
        S N in the dtype of x; summed in float32, in float64 if x is.
    """
    K, G = weight.shape[-1], 1 if scale is None else scale.shape[-1]  # noqa: N806
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Inductor sums up to 1024 numbers in vector registers and takes a slow compensated sum for more. Of int8, shorter
    # sums are faster: they run beside each other, where in a long one each addition waits for the one before.
    longest = 1024 if scale is None else 256
    pieces = next(n for n in range(G, K + 1, G) if K % n == 0 and K // n <= longest)
    # as_strided makes Inductor store x once instead of computing it again for each of the N outputs.
    row = x.to(dtype).contiguous().as_strided(x.shape, (K, 1)).unflatten(-1, (pieces, -1)).unsqueeze(1)
    sums = (weight[experts].unflatten(-1, (pieces, -1)).to(dtype) * row).sum(dim=-1)  # S N pieces
    if scale is not None:
        sums = sums.unflatten(-1, (G, -1)).sum(dim=-1) * scale[experts].to(dtype)
    return sums.sum(dim=-1).to(x.dtype)
