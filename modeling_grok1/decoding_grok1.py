# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The products of decoding, of one row each, cost what reading their matrix costs. torch's own read it at half the speed
of a CPU's memory; written as a multiply-and-reduce, torch.compile makes them read at full speed.
"""

import torch
from torch import nn


def decoding(x: torch.Tensor) -> bool:
    """Whether this is a compiled step of one token (x: ... D) on a CPU, without gradients."""
    one = x.device.type == "cpu" and x.numel() == x.shape[-1]
    return one and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def projected(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`; in a compiled step a multiply-and-reduce, unless an adapter, a quantiser or a hook is in place."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    if hooked or type(linear).forward is not nn.Linear.forward or linear.bias is not None or not decoding(x):
        return linear(x)
    only = torch.zeros(1, dtype=torch.long)
    return reduced_matmul(x.reshape(1, -1), linear.weight[None], only).view(*x.shape[:-1], -1)


def reduced_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y as a multiply-and-reduce, for few rows of x: ... M K by ... K N -> ... M N, summed in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype).unsqueeze(-1) * y.to(dtype).unsqueeze(-3)).sum(dim=-2).to(x.dtype)


def reduced_matmul(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Each row times the transpose of the matrix of its expert, as one multiply-and-reduce of the weights where they lie.

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
