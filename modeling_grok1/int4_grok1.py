# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Weights of 4 bits in memory: as in the files (packing_grok1.py), or in the order of torch's product for CPUs.

    packed     int32  ... N K/8          scale  ... N K/group, bfloat16
    for CPUs   uint8  ... N/B K B/2      scale  ... K/group N 2, bfloat16: the scale and a zero point, which is 0

B, 64 with AVX-512 and 32 with AVX2, outputs of a block are read together: a byte holds the values + 8 of the outputs b
and b + B/2 of a block, b in the lower half. Letters as in quantized_grok1.py.
"""

import functools

import torch

from .packing_grok1 import pack, unpack


# Groups of inputs that torch's product knows.
CPU_GROUP_SIZES = (32, 64, 128, 256)
# Outputs that are reordered at a time; a multiple of every block size.
REORDERED_OUTPUTS = 1024


@functools.cache
def cpu_block_size() -> int | None:
    """B of this processor, found by comparing with what torch does; None where torch orders weights differently."""
    outputs, inputs = 128, 64
    values = torch.arange(outputs * inputs).remainder(251).remainder(16).view(outputs, inputs)
    try:
        expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(torch.int32), 1)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    packed = pack((values - 8).to(torch.int8), 4)
    for block_size in (64, 32):
        if torch.equal(for_cpu(packed, block_size).flatten(), expected.flatten()):
            return block_size
    return None


def for_cpu(packed: torch.Tensor, block_size: int) -> torch.Tensor:
    """... N K/8, int32 -> ... N/B K B/2, uint8."""
    *batch, N, words = packed.shape  # noqa: N806
    ordered = packed.new_empty(*batch, N // block_size, words * 8, block_size // 2, dtype=torch.uint8)
    for matrix, out in zip(packed.reshape(-1, N, words), ordered.view(-1, *ordered.shape[-3:]), strict=True):
        step = REORDERED_OUTPUTS // block_size
        for start in range(0, len(out), step):
            rows = matrix[start * block_size : (start + step) * block_size]
            values = (unpack(rows, 4) + 8).view(torch.uint8).unflatten(0, (-1, 2, block_size // 2))  # n 2 B/2 K
            out[start : start + step] = (values[:, 0] | values[:, 1] << 4).transpose(1, 2)
    return ordered


def from_cpu(ordered: torch.Tensor) -> torch.Tensor:
    """The reverse of `for_cpu`: ... N/B K B/2, uint8 -> ... N K, int8, unpacked."""
    values = torch.cat((ordered & 15, ordered >> 4), dim=-1)  # ... N/B K B
    return values.transpose(-1, -2).flatten(-3, -2).contiguous().view(torch.int8) - 8


def is_for_cpu(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.uint8


def order_for_cpu(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A packed weight and its scales in the order of torch's product; as they are where it has none for them."""
    block_size, group_size = cpu_block_size(), packed.shape[-1] * 8 // scale.shape[-1]
    if block_size is None or packed.shape[-2] % block_size != 0 or group_size not in CPU_GROUP_SIZES:
        return packed, scale
    transposed = scale.transpose(-1, -2)
    return for_cpu(packed, block_size), torch.stack((transposed, torch.zeros_like(transposed)), dim=-1)


def as_in_files(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scales in either order -> packed, as in the files."""
    if not is_for_cpu(weight):
        return weight, scale
    *batch, blocks, inputs, half = weight.shape
    packed = weight.new_empty(*batch, blocks * half * 2, inputs // 8, dtype=torch.int32)
    for matrix, out in zip(weight.reshape(-1, blocks, inputs, half), packed.view(-1, *packed.shape[-2:]), strict=True):
        step = REORDERED_OUTPUTS // (2 * half)
        for start in range(0, blocks, step):
            part = slice(start * 2 * half, (start + step) * 2 * half)
            out[part] = pack(from_cpu(matrix[start : start + step]), 4)
    return packed, scale[..., 0].transpose(-1, -2).contiguous()


def int4_values(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scales in either order -> int8 ... N K, and ... N K/group."""
    if is_for_cpu(weight):
        return from_cpu(weight), scale[..., 0].transpose(-1, -2)
    return unpack(weight, 4), scale


def can_int4pack(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether `int4pack_matmul` takes these."""
    return is_for_cpu(weight) and x.dtype in (torch.bfloat16, torch.float32)


def int4pack_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: S K, bfloat16 or float32, times the transpose of a weight in the order for CPUs -> S N in the dtype of x."""
    groups, N = scale.shape[:2]  # noqa: N806
    weight = weight.reshape(N, -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), weight, x.shape[1] // groups, scale.to(x.dtype))
