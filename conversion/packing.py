"""The tensors of packed matrices, derived from xAI's int8 block by block: those of compressed-tensors
(modeling_grok1/packing_grok1.py) and the blocks of GGUF (`blocks`).

int8 is lossless: xAI's values, and each of its scales repeated for the groups of its block. int4 is quantised from the
exact product of value and scale in float32.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping

import torch

from grok1.conversion.blocks import (
    ROUNDING,
    inexact_scales,
    overflowing_scales,
    q4_0_rows,
    q8_0_rows,
    rounded_q8_0_rows,
)
from grok1.conversion.layout import Scratch, Slab, as_bytes, as_tensor
from grok1.conversion.names import BITS, Entry, HubTensor, Part
from grok1.conversion.xai.checkpoint import TensorFile
from grok1.files import BLOCK_SIZE
from modeling_grok1.packing_grok1 import GROUP_SIZES, pack, quantise_int4, repeat_scales


def group_size_problems(
    entries: Iterable[Entry], dtype: str, group_size: int, scale_blocks: Mapping[int, int]
) -> list[str]:
    """
    Why the matrices cannot be cut into groups, one line for each kind of tensor, with what would do.

    Args:
        entries: the files of the checkpoint.
        dtype: "int8", whose groups divide the blocks that have a scale, or "int4", whose groups divide the inputs.
        group_size: inputs per scale.
        scale_blocks: blocks with a scale of their own, by the index of the file.
    """
    sizes: dict[tuple[str, int], None] = {}
    unpackable: dict[str, int] = {}
    for entry in entries:
        if entry.kind.quantised:
            inputs = entry.shape[-2]
            sizes[entry.kind.name, inputs // scale_blocks[entry.index] if dtype == "int8" else inputs] = None
            if inputs * BITS[dtype] % 32 != 0:
                unpackable[entry.kind.name] = inputs
    what = "scale block" if dtype == "int8" else "row"
    wrong = [(name, size) for name, size in sizes if size % group_size != 0]
    fitting = [n for n in GROUP_SIZES if all(size % n == 0 for _, size in sizes)]
    other = "int4" if dtype == "int8" and all(size % 32 == 0 for _, size in sizes) else "bfloat16"
    advice = f"--group-size {' or '.join(map(str, fitting))}" if fitting else f"--dtype {other}"
    return [
        f"group_size: expected a divisor of the {size} inputs of a {what} of {name}, found {group_size}; "
        f"{advice} would do"
        for name, size in wrong
    ] + [
        f"dtype: expected rows of a multiple of {32 // BITS[dtype]} inputs for {dtype}, found {inputs} in {name}"
        for name, inputs in unpackable.items()
    ]


def inexact_scale_problems(files: Iterable[TensorFile], round_scales: bool) -> list[str]:
    """Which files have scales that the blocks of q8_0 cannot hold, one line for each.

    Args:
        files: of a checkpoint.
        round_scales: whether only those that are too large for float16 are wrong.
    """
    problems = []
    for file in files:
        if file.scales is not None:
            scales = as_tensor(file.scales.read(), "bfloat16")
            wrong = overflowing_scales(scales) if round_scales else inexact_scales(scales)
            if wrong:
                problems.append(
                    f"{file.path.name}: expected scales that float16 holds, found {wrong:,} of {scales.numel():,} "
                    f"that it does not hold{'' if round_scales else f'. {ROUNDING}'}"
                )
    return problems


class Packer:
    """Derives the blocks of packed tensors. Safe to use from several threads.

    The scales of an int4 matrix are found when its values are. They are kept until their own tensor is written, so
    that a matrix is quantised once; where another run wrote its values, they are found again.
    """

    def __init__(self, round_scales: bool = False) -> None:
        self.round_scales = round_scales
        self.lock = threading.Lock()
        self.scales: dict[tuple[int, int | None], list[tuple[int, torch.Tensor]]] = {}

    def constant(self, tensor: HubTensor, part: Part, consume: Callable[[memoryview], None]) -> bool:
        """Hands over what needs no array of the source: the shape of a matrix, and int4 scales that are kept."""
        if tensor.packing is None or part.field == "weight":
            return False
        if part.field == "shape":
            consume(as_bytes(torch.tensor(part.entry.shape[:-3:-1])))
            return True
        with self.lock:
            kept = sorted(self.scales.pop((part.entry.index, part.expert), []), key=lambda pair: pair[0])
        if sum(len(scales) for _, scales in kept) != tensor.shape[0]:
            return False
        consume(as_bytes(torch.cat([scales for _, scales in kept])))
        return True

    def source(self, tensor: HubTensor, part: Part) -> Part:
        """The part of the source that is read: int4 scales are found from the weight."""
        if tensor.packing is not None and tensor.packing.bits == 4 and part.field == "scales":
            return dataclasses.replace(part, field="weight")
        return part

    def rows(self, tensor: HubTensor, slab: Slab, first: int, last: int, scratch: Scratch) -> torch.Tensor:
        """Output rows [first, last) of a packed tensor."""
        if tensor.packing is None:
            return self.blocks(tensor, slab, first, last, scratch)
        packing, field = tensor.packing, tensor.parts[0].field
        if packing.bits == 8:
            if field == "weight":
                return pack(slab.rows(first, last, "int8", scratch), 8)
            return repeat_scales(slab.rows(first, last, "bfloat16", scratch), tensor.shape[1])
        values, scales = quantise_int4(slab.rows(first, last, "float32", scratch), packing.group_size)
        if field == "scales":
            return scales
        with self.lock:
            self.scales.setdefault((slab.part.entry.index, slab.part.expert), []).append((first, scales))
        return pack(values, 4)

    def blocks(self, tensor: HubTensor, slab: Slab, first: int, last: int, scratch: Scratch) -> torch.Tensor:
        """Output rows [first, last) of a tensor of blocks, as bytes."""
        if slab.scales is None:
            return rounded_q8_0_rows(slab.rows(first, last, "float32", scratch))
        if tensor.dtype == "q8_0":
            scales = slab.scale_rows(first, last)
            return q8_0_rows(tensor.name, slab.rows(first, last, "int8", scratch), scales, self.round_scales, scratch)
        values, scales = quantise_int4(slab.rows(first, last, "float32", scratch), BLOCK_SIZE)
        return q4_0_rows(tensor.name, values, scales, self.round_scales, scratch)
