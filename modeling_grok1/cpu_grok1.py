# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Which product a CPU computes. Products of one row are bound by the memory's bandwidth: they cost what reading their
matrix costs. Products of many rows are bound by arithmetic, which differs between processors by factors. `TABLE` says
which product is taken for which processor, weight and number of rows, and why.

The model's code is the same everywhere: within its layers, and within `fast_decoding`, torch's `F.linear` and `matmul`
are replaced by these products with the same result. Quantised weights (quantized_grok1.py) and the fused experts
(experts_grok1.py) ask the table themselves.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .kernels_grok1 import can_multiply_rows, can_multiply_tiles, kernels, rows_matmul, tiled_matmul


# Inductor sums up to this number of values in vector registers, and takes a slow compensated sum for more.
REDUCED_VALUES = 1024
# Query rows of a key head up to which the product of attention is bound by reading the keys.
FEW_QUERY_ROWS = 16
# Elements of keys from which oneDNN's product in bfloat16 is worth preparing it for each length of the cache.
LONG_CACHE = 2**18
# Elements of a weight that are turned into float32 at a time.
FLOAT32_ELEMENTS = 2**22


# --------------------------------------------------------------------------------------------------------------------
# The processor, and its products
# --------------------------------------------------------------------------------------------------------------------
class Level(NamedTuple):
    """What a processor has, as far as products differ."""

    bfloat16: bool  # oneDNN multiplies matrices of bfloat16 with instructions for them
    kernels: bool  # kernels_grok1.py is compiled, which needs AVX2


# What `ONEDNN_MAX_CPU_ISA` may be set to for oneDNN to use instructions for bfloat16.
ISA_WITH_BFLOAT16 = ("DEFAULT", "BF16", "FP16", "AMX", "AVX10")


@functools.cache
def level() -> Level:
    """That of this processor. Compiles kernels_grok1.py where no earlier process has."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
        bfloat16 = has and any(name in isa.upper() for name in ISA_WITH_BFLOAT16)
    else:
        bfloat16 = True  # ARM and others, unmeasured: what torch does there
    return Level(bfloat16, kernels() is not None)


ROWS, TILES, FLOATS = "kernel of rows", "kernel of tiles", "kernel of floats"  # those of kernels_grok1.py
REDUCTION = "multiply-and-reduce"
WITHOUT_ONEDNN = "torch without oneDNN"
FLOAT32 = "float32"
INT8PACK, INT4PACK = "torch's int8 product", "torch's 4-bit product"
PLAIN = "plain"  # `F.linear`, or dequantising to the dtype of the rows: the reference of the others

ONE, FEW, MANY = range(1, 2), range(2, 17), range(2, 2**62)
BF16, FP32, INT8, INT4 = torch.bfloat16, torch.float32, torch.int8, torch.int32


class Entry(NamedTuple):
    """The product of some weights and rows, where the conditions that are not None hold."""

    product: str
    weights: tuple[torch.dtype, ...]
    rows: range
    kernels: bool | None = None
    bfloat16: bool | None = None
    compiling: bool | None = None
    gradients: bool | None = False


# The first entry that fits is taken, and if its product does not take these shapes the next one. Rates are of one
# thread of an EPYC (Zen 4) with matrices that no cache holds; the memory gives it 22 to 26 GB/s.
TABLE = (
    # One row. Without compiling torch reads bfloat16 at 8 to 14 GB/s, int8 at 2 to 6 and 4 bits at 3.5; the kernel at
    # 20 to 25, 15 to 19 and 10. The compiled reduction of int8 is scalar on AVX2: 1.4 GB/s.
    Entry(ROWS, (BF16,), ONE, kernels=True, compiling=False),
    Entry(ROWS, (INT8, INT4), ONE, kernels=True),
    # Inductor fuses it with what is around it and reads bfloat16 and float32 at the memory's rate.
    Entry(REDUCTION, (BF16, FP32, INT8), ONE, compiling=True),
    # oneDNN reads a matrix of bfloat16 at half the rate of torch's own kernel for one row.
    Entry(WITHOUT_ONEDNN, (BF16,), ONE, kernels=False, compiling=False),
    # More rows without instructions for bfloat16: torch multiplies bfloat16 with 18 to 20 GFLOP/s, float32 with 55 to
    # 60, and the tiles reach 85, of any weight.
    Entry(TILES, (BF16, INT8, INT4), MANY, kernels=True, bfloat16=False, compiling=False),
    Entry(FLOAT32, (BF16,), MANY, bfloat16=False),
    # The backward pass needs the other two products as well, which float32 has.
    Entry(FLOAT32, (BF16,), range(1, 2**62), bfloat16=False, gradients=True),
    # With them oneDNN reaches 85 to 180. The tiles are faster while dequantising costs more than multiplying.
    Entry(TILES, (INT8, INT4), FEW, kernels=True, bfloat16=True, compiling=False),
    Entry(FLOATS, (INT8, INT4), MANY, kernels=True, bfloat16=True, compiling=False),
    # Without a compiler: torch's products of few rows, and dequantising to what is multiplied fastest.
    Entry(INT8PACK, (INT8,), range(1, 17), compiling=False),
    Entry(INT4PACK, (torch.uint8,), range(1, 33), compiling=False),
    Entry(FLOAT32, (INT8, INT4, torch.uint8), MANY, bfloat16=False),
)


@functools.lru_cache(maxsize=1024)
def products(
    level: Level, weight: torch.dtype, rows: int, compiling: bool, gradients: bool = False
) -> tuple[str, ...]:
    """The products for this number of rows, the fastest first; the last is `PLAIN`, which takes all shapes."""
    facts = {"kernels": level.kernels, "bfloat16": level.bfloat16, "compiling": compiling, "gradients": gradients}
    fitting = [
        entry.product
        for entry in TABLE
        if weight in entry.weights
        and rows in entry.rows
        and all(getattr(entry, name) in (None, value) for name, value in facts.items())
    ]
    return (*fitting, PLAIN)


@torch.compiler.assume_constant_result
def is_first(product: str, weight: torch.dtype, rows: int, compiling: bool, gradients: bool = False) -> bool:
    """Whether `product` is this processor's first choice. Under torch.compile it is asked while tracing."""
    return products(level(), weight, rows, compiling, gradients)[0] == product


# --------------------------------------------------------------------------------------------------------------------
# In place of torch's functions
# --------------------------------------------------------------------------------------------------------------------
class CPUProducts(TorchFunctionMode):
    """Replaces `F.linear` without bias, and the matmuls of attention, on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.linear and not kwargs and (len(args) == 2 or args[2] is None):
            return self.linear(*args[:2])
        if func is torch.matmul and len(args) == 2 and not kwargs and is_attention(*args):
            return attention_matmul(*args)
        return func(*args, **(kwargs or {}))

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)


CPU_PRODUCTS = CPUProducts()


def with_cpu_products(forward: Callable) -> Callable:
    """The `forward` of a module with the products of this file on a CPU. A module recomputed by gradient
    checkpointing takes the same products again."""

    @functools.wraps(forward)
    def wrapped(self: nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> Any:
        if hidden_states.device.type != "cpu" or torch.compiler.is_exporting():
            return forward(self, hidden_states, *args, **kwargs)
        if not torch.compiler.is_compiling() and inside.decoding:
            return forward(self, hidden_states, *args, **kwargs)
        with CPU_PRODUCTS:
            return forward(self, hidden_states, *args, **kwargs)

    return wrapped


@contextmanager
def fast_decoding(model: nn.Module | None = None) -> Iterator[None]:
    """
    For a decoding loop on a CPU; `generate` uses it for its own. The model's layers take the fast products of this
    file everywhere; within this they do so also where kernels_grok1.py could not be compiled, for which oneDNN is
    switched off while single tokens are computed, and modules outside of the layers do too.

    With batches of several sequences, with gradients, and on other devices nothing changes.

    Args:
        model: the model that decodes; nothing is done where its parameters are not on a CPU. None: unknown.
    """
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None and parameter.device.type != "cpu":
        yield
        return
    mode, before = DecodingProducts(), inside.decoding
    try:
        inside.decoding = True
        with mode:
            yield
    finally:
        inside.decoding = before
        mode.close()


class Inside(threading.local):
    decoding = False  # whether this thread is within `fast_decoding`


inside = Inside()


class DecodingProducts(CPUProducts):
    """As its parent; switches oneDNN off while single tokens of bfloat16 are computed without kernels_grok1.py."""

    def __init__(self) -> None:
        super().__init__()
        self.one_token = False  # whether this step is one token; the projections (inputs B T D) tell
        self.without_onednn = False

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or is_first(ROWS, BF16, 1, False):
            return linear(x, weight)
        if x.ndim == 3:
            self.one_token = is_multiplied_here(x, weight) and x.numel() == x.shape[-1]
        # Switched once in a loop of single tokens, not once in a product.
        if self.one_token and not self.without_onednn and wants_onednn_off(x):
            self.without_onednn = True
            ONEDNN.leave()
        elif self.without_onednn and not self.one_token:
            self.close()
        return linear(x, weight)

    def close(self) -> None:
        if self.without_onednn:
            self.without_onednn = False
            ONEDNN.enter()


def wants_onednn_off(x: torch.Tensor) -> bool:
    return x.dtype == BF16 and not torch.is_grad_enabled() and is_first(WITHOUT_ONEDNN, BF16, 1, False)


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


def is_multiplied_here(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these are plain tensors of one floating dtype on a CPU."""
    return (
        x.device.type == "cpu"
        and type(weight) in (torch.Tensor, nn.Parameter)
        and weight.dtype == x.dtype
        and weight.dtype in (BF16, FP32)
    )


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight)` by the product of the table."""
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return autocast_linear(x, weight)
    if not is_multiplied_here(x, weight) or x.numel() == 0:
        return F.linear(x, weight)
    compiling, gradients = torch.compiler.is_compiling(), torch.is_grad_enabled()
    rows = 1 if x.numel() == x.shape[-1] else 2  # the table has no other distinction for floats
    if is_first(ROWS, weight.dtype, rows, compiling, gradients) and can_multiply_rows(x, weight, None):
        y = rows_matmul(x.reshape(-1, x.shape[-1]), weight)
    elif is_first(REDUCTION, weight.dtype, rows, compiling, gradients):
        only = torch.zeros(1, dtype=torch.long)
        y = matmul_by_reduction(x.reshape(1, -1), weight[None], only)
    elif is_first(TILES, weight.dtype, rows, compiling, gradients) and can_multiply_tiles(x, weight, None):
        y = tiled_matmul(x.reshape(-1, x.shape[-1]), weight)
    elif any(is_first(product, weight.dtype, rows, compiling, gradients) for product in (FLOAT32, TILES)):
        y = linear_in_float32(x.reshape(-1, x.shape[-1]), weight, gradients)
    else:
        return F.linear(x, weight)
    return y.view(*x.shape[:-1], y.shape[-1])


def autocast_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As autocast does: in its dtype."""
    dtype = torch.get_autocast_dtype("cpu")
    if dtype != BF16 or is_first(PLAIN, BF16, 2, torch.compiler.is_compiling(), torch.is_grad_enabled()):
        return F.linear(x, weight)
    with torch.autocast("cpu", enabled=False):
        return linear(x.to(dtype), weight.to(dtype))


def linear_in_float32(x: torch.Tensor, weight: torch.Tensor, gradients: bool) -> torch.Tensor:
    """x: S K, weight: N K, bfloat16 -> S N, bfloat16, multiplied in float32."""
    if gradients:
        return Float32Linear.apply(x, weight)
    if torch.compiler.is_compiling():
        return F.linear(x.float(), weight.float()).to(x.dtype)
    rows = x.float()
    return torch.cat([F.linear(rows, part.float()).to(x.dtype) for part in parts_of(weight)], dim=-1)


def parts_of(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Some outputs at a time, so that a matrix is never whole in float32."""
    return weight.split(max(1, FLOAT32_ELEMENTS // weight.shape[-1]))


class Float32Linear(torch.autograd.Function):
    """`F.linear` of bfloat16 (x: S K, weight: N K), forward and backward with float32 products of some outputs at a
    time; tensors are saved in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if not torch.compiler.is_compiling() and level().kernels and can_multiply_tiles(x, weight, None):
            return tiled_matmul(x, weight)
        return linear_in_float32(x, weight, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight = ctx.needs_input_grad
        rows, grad_x = x.float(), x.new_zeros(x.shape, dtype=FP32) if wanted_x else None
        grad_weights = []
        with torch.autocast("cpu", enabled=False):
            parts = parts_of(weight)
            for part, grad in zip(parts, gradient.float().split([len(part) for part in parts], dim=-1), strict=True):
                if grad_x is not None:
                    grad_x.addmm_(grad, part.float())
                if wanted_weight:
                    grad_weights.append((grad.T @ rows).to(weight.dtype))
        return (
            None if grad_x is None else grad_x.to(x.dtype),
            torch.cat(grad_weights) if wanted_weight else None,
        )


def is_attention(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether this is B K rows a @ B K a b on a CPU, for which `attention_matmul` is faster than torch."""
    if x.ndim != 4 or y.ndim != 4 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    compiling, gradients = torch.compiler.is_compiling(), torch.is_grad_enabled()
    slow = x.dtype == BF16 and not is_first(PLAIN, BF16, 2, compiling, gradients)
    return slow or (x.shape[0] == 1 and x.shape[2] <= FEW_QUERY_ROWS and not gradients)


def attention_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y, summed in float32: ... M K by ... K N -> ... M N in the dtype of x."""
    few = x.shape[2] <= FEW_QUERY_ROWS and not torch.is_grad_enabled()
    if few:
        return matmul_of_few_rows(x, y)
    return torch.matmul(x.float(), y.float()).to(x.dtype)


def matmul_of_few_rows(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x @ y of few rows, summed in float32: ... M K by ... K N -> ... M N in the dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():
        return (computed_once(x.to(dtype)).unsqueeze(-1) * y.to(dtype).unsqueeze(-3)).sum(dim=-2).to(x.dtype)
    if y.numel() > LONG_CACHE:
        return torch.matmul(x, y)
    return torch.matmul(x.to(dtype), y.to(dtype)).to(x.dtype)


def can_multiply_chosen(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether `chosen_matmul` takes one row (x: 1 K, or the same row for each expert) and these matrices: E N K."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    compiling = torch.compiler.is_compiling()
    if scale is None and weight.dtype != x.dtype:
        return False
    if is_first(ROWS, weight.dtype, 1, compiling):
        return can_multiply_rows(x, weight, scale) or (compiling and weight.dtype != INT4)
    return compiling and (weight.dtype == INT8 or weight.is_floating_point())


def chosen_matmul(
    x: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Each row (x: S K) times the transpose of the matrix of its expert (weight: E N K, experts: S) -> S N."""
    compiling = torch.compiler.is_compiling()
    if is_first(ROWS, weight.dtype, 1, compiling) and can_multiply_rows(x, weight, scale):
        return (torch.ops.grok1.cpu_rows if compiling else rows_matmul)(x, weight, scale, experts)
    return matmul_by_reduction(x, weight, experts, scale)


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
