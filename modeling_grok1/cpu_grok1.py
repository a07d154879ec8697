# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Fast decoding on a CPU. Products of one row are bound by the memory's bandwidth: they cost what reading their matrix
costs. Within `fast_decoding`, torch's own functions for them are replaced by faster ones with the same result; the
model's code is the same.

    eager      bfloat16 without oneDNN, which reads a matrix at half the rate of torch's own kernel for one row
    compiled   a multiply-and-reduce, from which Inductor generates a loop that reads at the memory's rate
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


# Inductor sums up to this number of values in vector registers, and takes a slow compensated sum for more.
REDUCED_VALUES = 1024
# Query rows of a key head up to which the product of attention is bound by reading the keys.
FEW_QUERY_ROWS = 16
# Elements of keys from which oneDNN's product in bfloat16 is worth preparing it for each length of the cache.
LONG_CACHE = 2**18


@contextmanager
def fast_decoding(model: nn.Module | None = None) -> Iterator[None]:
    """
    Within it, this thread computes products of one row on a CPU at the rate of the memory. `generate` does so for its
    decoding loop; use it around a decoding loop of your own. It costs a microsecond to enter.

    With batches of several sequences, with gradients, and on other devices nothing changes.

    Args:
        model: the model that decodes; nothing is done where its parameters are not on a CPU. None: unknown.
    """
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        yield
        return
    mode = RowProducts()
    try:
        with mode:
            yield
    finally:
        mode.close()


class RowProducts(TorchFunctionMode):
    """Replaces `F.linear` of one row, and the products of attention for few queries, on a CPU without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.one_token = False  # whether this step is one token; the projections (inputs B T D) tell
        self.without_onednn = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and not kwargs and (len(args) == 2 or args[2] is None):
            return self.linear(*args[:2])
        if func is torch.matmul and len(args) == 2 and not kwargs and is_attention_of_few_rows(*args):
            return matmul_of_few_rows(*args)
        return func(*args, **(kwargs or {}))

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            if not is_one_row(x, weight):
                return F.linear(x, weight)
            only = torch.zeros(1, dtype=torch.long)
            return matmul_by_reduction(x.reshape(1, -1), weight[None], only).view(*x.shape[:-1], -1)
        if x.ndim == 3:
            self.one_token = is_one_row(x, weight)
        # Switched once in a loop of single tokens, not once in a product.
        if self.one_token and not self.without_onednn and x.dtype == torch.bfloat16:
            self.without_onednn = True
            ONEDNN.leave()
        elif self.without_onednn and not self.one_token:
            self.close()
        return F.linear(x, weight)

    def close(self) -> None:
        if self.without_onednn:
            self.without_onednn = False
            ONEDNN.enter()


class OneDNN:
    """The process's switch of oneDNN, off while any thread decodes bfloat16, and as it was before afterwards. What
    other threads multiply meanwhile is as right and may be slower."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.outside = 0
        self.before: Any = True

    def leave(self) -> None:
        with self.lock:
            if self.outside == 0:
                self.before = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self.outside += 1

    def enter(self) -> None:
        with self.lock:
            self.outside -= 1
            if self.outside == 0:
                torch.backends.mkldnn.enabled = self.before


ONEDNN = OneDNN()


def is_one_row(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `F.linear(x, weight)` is one row of plain tensors on a CPU, without gradients."""
    return (
        x.numel() == x.shape[-1]
        and x.device.type == "cpu"
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.dtype == x.dtype
        and not torch.is_grad_enabled()
    )


def is_attention_of_few_rows(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether this is 1 K rows a @ 1 K a b with few rows on a CPU, without gradients."""
    return (
        x.ndim == 4
        and y.ndim == 4
        and x.shape[0] == 1
        and x.shape[2] <= FEW_QUERY_ROWS
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
    )


def compiled_row(x: torch.Tensor) -> bool:
    """Whether this is one row (x: ... D) on a CPU under torch.compile, without gradients."""
    one = torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1]
    return one and not torch.is_grad_enabled()


def matmul_of_few_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y of few rows, summed in float32: ... M K by ... K N -> ... M N in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (computed_once(x.to(dtype)).unsqueeze(-1) * y.to(dtype).unsqueeze(-3)).sum(dim=-2).to(x.dtype)
    if y.numel() > LONG_CACHE:
        return torch.matmul(x, y)
    return torch.matmul(x.to(dtype), y.to(dtype)).to(x.dtype)


def computed_once(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous. Inductor writes it to memory instead of computing it again wherever it is read."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def matmul_by_reduction(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Each row times the transpose of the matrix of its expert, as one multiply-and-reduce of the weights in place.

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
    # Four outputs of four quarters of the matrix at a time: they share each load of x, and four distant streams keep
    # more of the memory busy than one.
    streams = 4 if N % 4 == 0 else 1
    pieces = next(n for n in range(G, K + 1, G) if K % n == 0 and K // n <= REDUCED_VALUES)
    # Views, for Dynamo does not trace `Tensor.unflatten` within a TorchFunctionMode.
    row = computed_once(x.to(dtype)).view(-1, 1, pieces, K // pieces)
    quarters = weight[experts].view(-1, N, pieces, K // pieces).chunk(streams, dim=1)  # each S N/4 pieces K/pieces
    sums = torch.cat([(quarter.to(dtype) * row).sum(dim=-1) for quarter in quarters], dim=1)  # S N pieces
    if scale is not None:
        sums = sums.view(-1, N, G, pieces // G).sum(dim=-1) * scale[experts].to(dtype)
    return sums.sum(dim=-1).to(x.dtype)


@functools.cache
def keep_freed_memory() -> None:
    """
    Let glibc keep up to 64 MiB of freed memory instead of returning it to the system. A layer needs more for a prompt
    of some hundred tokens than the default threshold (`M_MMAP_THRESHOLD` in mallopt(3)) keeps, and would fault the
    same pages in for every layer. The threshold is twice the largest block that was freed; a block of 32 MiB, the
    largest that counts, is allocated and freed here. It is never written to, so it takes no memory. Harmless with
    other allocators.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")
