# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
What the rate of a CPU's memory asks for. The products of decoding, of one row each, cost what reading their matrix
costs. torch.compile reads it at the memory's rate where they are written as a multiply-and-reduce. Without it torch
hands those of bfloat16 to oneDNN, which reads at half to two thirds of the rate of torch's own kernel.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def one_row(x: torch.Tensor) -> bool:
    """Whether this is a step of one token (x: ... D) on a CPU, without gradients."""
    return x.device.type == "cpu" and x.numel() == x.shape[-1] and not torch.is_grad_enabled()


def decoding(x: torch.Tensor) -> bool:
    """Whether this is a compiled step of one token."""
    return one_row(x) and torch.compiler.is_compiling()


def projected(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`linear(x)`, fast in a step of one token, unless an adapter, a quantiser or a hook is in place."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    if hooked or type(linear).forward is not nn.Linear.forward or linear.bias is not None or not one_row(x):
        return linear(x)
    if torch.compiler.is_compiling():
        only = torch.zeros(1, dtype=torch.long)
        return reduced_matmul(x.reshape(1, -1), linear.weight[None], only).view(*x.shape[:-1], -1)
    return row_linear(x, linear.weight)


def row_matmul(x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Each row of x (S K) times the transpose of the matrix of its expert (weight: E N K; experts: S) -> S N."""
    if torch.compiler.is_compiling():
        return reduced_matmul(x, weight, experts)
    return torch.cat([row_linear(row, weight[e]) for row, e in zip(x.split(1), experts.tolist(), strict=True)])


def row_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` of one row, at the memory's rate in bfloat16 too."""
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight)
    with without_onednn():
        return F.linear(x, weight)


class OneDNNSwitch:
    """The state of `without_onednn`: how many threads are inside, and what the switch was before the first."""

    lock = threading.Lock()
    inside = 0
    before: Any = True


@contextmanager
def without_onednn() -> Iterator[None]:
    """
    torch's own kernels instead of oneDNN's. The switch is the process's: what other threads multiply meanwhile is as
    right and may be slower, so this is for single products. The last thread to leave puts it back.
    """
    with OneDNNSwitch.lock:
        if OneDNNSwitch.inside == 0:
            OneDNNSwitch.before = torch.backends.mkldnn.enabled
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        OneDNNSwitch.inside += 1
    try:
        yield
    finally:
        with OneDNNSwitch.lock:
            OneDNNSwitch.inside -= 1
            if OneDNNSwitch.inside == 0:
                torch.backends.mkldnn.enabled = OneDNNSwitch.before


def row_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y for the attention of one token, which has few rows: ... M K by ... K N -> ... M N, summed in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (stored(x.to(dtype)).unsqueeze(-1) * y.to(dtype).unsqueeze(-3)).sum(dim=-2).to(x.dtype)
    if y.numel() > 2**18:
        return torch.matmul(x, y)
    # In bfloat16 oneDNN would prepare a product for each length of the cache, which a short one is not worth.
    return torch.matmul(x.to(dtype), y.to(dtype)).to(x.dtype)


def stored(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous. Inductor stores it once instead of computing it again wherever it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


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
    _, N, K = weight.shape  # noqa: N806
    G = 1 if scale is None else scale.shape[-1]  # noqa: N806
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Four outputs of four quarters of the matrix at a time: they share each load of x, which is four bytes for each
    # weight's one or two, their sums run beside each other, and four distant streams keep more of the memory busy.
    streams = 4 if N % 4 == 0 else 1
    # Inductor sums up to 1024 numbers in vector registers and takes a slow compensated sum for more.
    pieces = next(n for n in range(G, K + 1, G) if K % n == 0 and K // n <= 1024)
    row = stored(x.to(dtype)).unflatten(-1, (pieces, -1)).unsqueeze(1)
    quarters = weight[experts].unflatten(-1, (pieces, -1)).chunk(streams, dim=1)  # each S N/4 pieces K/pieces
    sums = torch.cat([(quarter.to(dtype) * row).sum(dim=-1) for quarter in quarters], dim=1)  # S N pieces
    if scale is not None:
        sums = sums.unflatten(-1, (G, -1)).sum(dim=-1) * scale[experts].to(dtype)
    return sums.sum(dim=-1).to(x.dtype)


def keep_freed_memory() -> None:
    """
    Let glibc keep up to 64 MiB that was freed. By its own rule it keeps twice the largest block that was freed before,
    of at most 32 MiB (`M_MMAP_THRESHOLD` in mallopt(3)): less than a layer needs for a prompt of some hundred tokens,
    which then faults the same pages in again and again, a third of its time. So a block of that size is freed here. It
    is never written to, so it takes no memory; other allocators do not mind.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
