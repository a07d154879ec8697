# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
The grouped product of quantized_grok1.py as a Triton kernel: the weight is read as int8, or as two values of 4 bits
per byte, and dequantised in registers. Importing this file raises ImportError where Triton is not installed.

Letters as in quantized_grok1.py: S rows in order of their expert, E experts, N outputs, K inputs, G scale blocks.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel for quantised weights needs Triton: `pip install triton`") from error

import torch


@triton.jit
def quantised_matmul_kernel(
    x_ptr,  # S K
    weight_ptr,  # E N K, int8; with 4 bits E N K/2, uint8
    scale_ptr,  # E N G
    offsets_ptr,  # E, int32: rows of the experts 0..e
    y_ptr,  # S N
    N,  # noqa: N803
    K,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    BLOCK_S: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
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
        row_mask = rows < last
        column_mask = columns < N
        # 64 bits: the experts of a released layer have more than 2^31 elements.
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
        weight_rows = expert.to(tl.int64) * N + columns
        total = tl.full((BLOCK_S, BLOCK_N), 0.0, dtype=tl.float32)
        for group in range(K // GROUP):
            scale = tl.load(scale_ptr + weight_rows * (K // GROUP) + group, mask=column_mask, other=0.0)
            for offset in range(0, GROUP, BLOCK_K):
                k = group * GROUP + offset + inner
                in_group = offset + inner < GROUP
                x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & in_group[None, :], other=0.0)
                w = tl.load(
                    weight_ptr + weight_rows[None, :] * (K * BITS // 8) + (k * BITS // 8)[:, None],
                    mask=column_mask[None, :] & in_group[:, None],
                    other=0,
                )
                if BITS == 4:
                    w = ((w.to(tl.int32) >> (k % 2 * 4)[:, None]) & 15) - 8
                w = (w.to(tl.float32) * scale.to(tl.float32)[None, :]).to(x.dtype)
                total = tl.dot(x, w, total, input_precision="ieee")
        y = y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(y, total.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def quantised_grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """
    The rows of each expert times the transpose of its matrix, float32 accumulation.

    Args:
        x: S K, bfloat16, float16 or float32; rows offsets[e-1] .. offsets[e]-1 belong to expert e.
        weight: E N K, int8; or E N K/8, int32, 4 bits packed as in packing_grok1.py.
        scale: E N G, G divides K.
        offsets: E, int32, on the same device; it is never read on the host.

    Returns:
        S N in the dtype of x; rows from offsets[-1] on are zero.
    """
    S, K = x.shape  # noqa: N806
    E, N = weight.shape[:2]  # noqa: N806
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    bits = 8 if weight.dtype == torch.int8 else 4
    group = K // scale.shape[-1]
    y = x.new_zeros(S, N)
    if S == 0:
        return y
    # Few rows fit into one narrow tile per expert, so that each chosen matrix is read once.
    few = S <= 16 * E
    block_s, block_n, block_k = (16, 32, 256) if few else (64, 128, 64)
    if x.dtype == torch.float32:
        block_k //= 2
    block_k = min(block_k, max(16, triton.next_power_of_2(group)))
    # The rows of each expert start a new tile: at most E - 1 tiles more than all rows would fill.
    tiles = min(S, triton.cdiv(S, block_s) + E - 1)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        quantised_matmul_kernel[(tiles, triton.cdiv(N, block_n))](
            x,
            weight if bits == 8 else weight.view(torch.uint8),
            scale,
            offsets,
            y,
            N,
            K,
            E=E,
            BITS=bits,
            GROUP=group,
            BLOCK_S=block_s,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return y
