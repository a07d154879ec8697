# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The grouped product of quantized_grok1.py as a Triton kernel: the weight is read as int8, or as two values of 4 bits
per byte, and dequantised in registers. Importing this file raises ImportError where Triton is not installed.

Letters as in quantized_grok1.py: S rows in order of their expert, E experts, N outputs, K inputs, G scale blocks.
"""

import functools


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel for quantised weights needs Triton: `pip install triton`") from error

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """How a product is cut: rows, outputs and inputs of a tile, warps and pipeline stages of a program, and programs
    that share the inputs of a tile (0: as many as give every multiprocessor two programs)."""

    block_s: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1


# (few rows, bits) -> tile. Chosen by reasoning for Hopper, unmeasured; `make gpu` writes the winners of a card in this
# form. Few rows are bound by reading the weight: a tile is as low as the tensor cores allow, and a program keeps
# block_n * block_k * bits / 8 * (num_stages - 1) bytes in flight, 12 to 24 KiB, of which several programs fit on a
# multiprocessor. A step is within one scale block, so groups of 128 take half of block_k of int4's few rows. See
# benchmarks/GPU.md for registers, shared memory and occupancy.
TILES = {
    (True, 8): Tile(16, 32, 256, num_warps=4, num_stages=4, split_k=0),
    (True, 4): Tile(16, 64, 256, num_warps=4, num_stages=4, split_k=0),
    (False, 8): Tile(64, 128, 64, num_warps=4, num_stages=3),
    (False, 4): Tile(64, 128, 64, num_warps=4, num_stages=3),
}


# Prompts of all lengths share one compilation.
@triton.jit(do_not_specialize=["S"])
def quantised_matmul_kernel(
    x_ptr,  # S K
    weight_ptr,  # E N K, int8; with 4 bits E N K/2, uint8
    scale_ptr,  # E N G
    offsets_ptr,  # E, int32: rows of the experts 0..e
    y_ptr,  # SPLIT_K S N
    S,  # noqa: N803
    N,  # noqa: N803
    K,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    BLOCK_S: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    SPLIT_K: tl.constexpr,  # noqa: N803
):
    # Find the expert whose rows this program multiplies. Tiles are numbered expert by expert.
    tile = tl.program_id(0)
    zero = tile * 0
    expert, first, last, start, tiles = zero - 1, zero, zero, zero, zero
    for e in range(E):
        end = tl.load(offsets_ptr + e)
        own = (end - start + BLOCK_S - 1) // BLOCK_S
        mine = (tile >= tiles) & (tile < tiles + own)
        expert = tl.where(mine, e, expert)
        first = tl.where(mine, start + (tile - tiles) * BLOCK_S, first)
        last = tl.where(mine, end, last)
        tiles += own
        start = end
    if expert >= 0:
        rows = first + tl.arange(0, BLOCK_S)
        columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        inner_bytes = tl.arange(0, BLOCK_K * BITS // 8)
        row_mask = rows < last
        column_mask = columns < N
        # 64 bits: the experts of a released layer have more than 2^31 elements.
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
        weight_rows = expert.to(tl.int64) * N + columns
        total = tl.full((BLOCK_S, BLOCK_N), 0.0, dtype=tl.float32)
        # Each of SPLIT_K programs sums a part of the inputs. A step is within one scale block.
        steps_per_group = (GROUP + BLOCK_K - 1) // BLOCK_K
        steps = K // GROUP * steps_per_group
        part = tl.program_id(2)
        for step in range(steps * part // SPLIT_K, steps * (part + 1) // SPLIT_K):
            group = step // steps_per_group
            offset = step % steps_per_group * BLOCK_K
            k = group * GROUP + offset
            scale = tl.load(scale_ptr + weight_rows * (K // GROUP) + group, mask=column_mask, other=0.0)
            x_mask, w_mask = row_mask[:, None], column_mask[None, :]
            if GROUP % BLOCK_K != 0:
                x_mask = x_mask & (offset + inner < GROUP)[None, :]
                w_mask = w_mask & (offset + inner_bytes * 8 // BITS < GROUP)[:, None]
            # The compiler loads 16 bytes at a time only where it sees that addresses follow each other.
            x = tl.load(x_rows + (k + inner)[None, :], mask=x_mask, other=0.0)
            w_rows = weight_ptr + weight_rows[None, :] * (K * BITS // 8)
            w = tl.load(w_rows + (k * BITS // 8 + inner_bytes)[:, None], mask=w_mask, other=0)
            if BITS == 8:
                w = (w.to(tl.float32) * scale.to(tl.float32)[None, :]).to(x.dtype)
                total = tl.dot(x, w, total, input_precision="ieee")
            else:
                # Inputs with even and odd numbers are the lower and the upper halves of the bytes.
                even, odd = tl.split(tl.reshape(x, (BLOCK_S, BLOCK_K // 2, 2)))
                low = ((w & 15).to(tl.float32) - 8) * scale.to(tl.float32)[None, :]
                high = ((w >> 4).to(tl.float32) - 8) * scale.to(tl.float32)[None, :]
                total = tl.dot(even, low.to(x.dtype), total, input_precision="ieee")
                total = tl.dot(odd, high.to(x.dtype), total, input_precision="ieee")
        y = y_ptr + (part.to(tl.int64) * S + rows)[:, None] * N + columns[None, :]
        tl.store(y, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def quantised_grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """
    The rows of each expert times the transpose of its matrix, float32 accumulation. No value is read on the host.

    Args:
        x: S K, bfloat16, float16 or float32; rows offsets[e-1] .. offsets[e]-1 belong to expert e.
        weight: E N K, int8; or E N K/8, int32, 4 bits packed as in packing_grok1.py.
        scale: E N G, G divides K.
        offsets: E, int32, on the same device.
        tile: by default that of `TILES`.

    Returns:
        S N in the dtype of x; rows from offsets[-1] on are zero.
    """
    S, K = x.shape  # noqa: N806
    E, N = weight.shape[:2]  # noqa: N806
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    bits = 8 if weight.dtype == torch.int8 else 4
    group = K // scale.shape[-1]
    if S == 0:
        return x.new_zeros(S, N)
    # Few rows fit into one low tile per expert, so that each chosen matrix is read once.
    tile = tile or TILES[S <= 16 * E, bits]
    block_k = tile.block_k // 2 if x.dtype == torch.float32 else tile.block_k
    block_k = min(block_k, max(16, triton.next_power_of_2(group)))
    # The rows of each expert start a new tile: at most E - 1 tiles more than all rows would fill.
    tiles, columns = min(S, triton.cdiv(S, tile.block_s) + E - 1), triton.cdiv(N, tile.block_n)
    steps = K // group * triton.cdiv(group, block_k)
    split_k = min(steps, tile.split_k or max(1, 2 * multiprocessors(x.device) // (tiles * columns)))
    # The parts of a sum are added in float32 and in order, so the result does not depend on the schedule.
    y = x.new_zeros(split_k, S, N, dtype=x.dtype if split_k == 1 else torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        quantised_matmul_kernel[(tiles, columns, split_k)](
            x,
            weight if bits == 8 else weight.view(torch.uint8),
            scale,
            offsets,
            y,
            S,
            N,
            K,
            E=E,
            BITS=bits,
            GROUP=group,
            BLOCK_S=tile.block_s,
            BLOCK_N=tile.block_n,
            BLOCK_K=block_k,
            SPLIT_K=split_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y[0] if split_k == 1 else y.sum(dim=0).to(x.dtype)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
