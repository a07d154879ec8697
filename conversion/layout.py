"""The operations between xAI's arrays and the hub's tensors.

xAI stores a matrix (K, N) = (in, out), int8 with bfloat16 scales (G, N): scale row g covers the contiguous input rows
[g * K/G, (g+1) * K/G). The hub's tensors are (out, in). Everything here is exact or rounds once: the product of an
int8 and a bfloat16 has at most 16 significant bits, so float32 holds it, and bfloat16 is that product rounded to
nearest even.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from grok1.arrays import NUMPY_DTYPE, RawArray
from grok1.conversion.names import Part
from grok1.conversion.xai.checkpoint import TensorFile
from grok1.errors import CheckpointError
from grok1.files import ITEMSIZE


TORCH_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
TORCH_DTYPE |= {"int32": torch.int32, "int64": torch.int64}

# One expert of the release (6144 x 32768 int8, 192 MiB) is read at once.
SLAB_BYTES = 200 * 2**20
BAND_READ_BYTES = 16 * 2**20
# Elements per block: its temporaries stay in the CPU caches.
BLOCK_ELEMENTS = 2**21


def as_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """A numpy array of the reader as a tensor that shares its memory; the bits of bfloat16 come as uint16."""
    if dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class Scratch:
    """Memory for temporaries that is reused: fresh pages for each block would take as long as all the arithmetic.

    A tensor in it is valid until it is used for the next block. For one thread at a time.
    """

    def __init__(self) -> None:
        self.memory: dict[str, torch.Tensor] = {}

    def empty(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous uninitialised tensor, in the memory that this purpose had before if it is large enough."""
        nbytes = math.prod(shape) * dtype.itemsize
        if purpose not in self.memory or self.memory[purpose].numel() < nbytes:
            self.memory[purpose] = torch.empty(nbytes, dtype=torch.uint8)
        return self.memory[purpose][:nbytes].view(dtype).view(shape)

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in another dtype, contiguous; itself if nothing changes."""
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        return self.empty(f"cast to {dtype}", tuple(tensor.shape), dtype).copy_(tensor)


def dequantise(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32(weight) * float32(scale), exact.

    Args:
        weight: (..., K, N), int8, or those values in float32: then the product replaces them.
        scales: (..., G, N), bfloat16.

    Returns:
        float32 (..., K, N).
    """
    *lead, rows, columns = weight.shape
    groups = scales.shape[-2]
    product = weight.to(torch.float32).reshape(*lead, groups, rows // groups, columns)
    return product.mul_(scales.to(torch.float32).unsqueeze(-2)).reshape(weight.shape)


def transpose(matrix: torch.Tensor, scratch: Scratch | None = None) -> torch.Tensor:
    """A contiguous copy of the transpose of a matrix: (in, out) to (out, in) and back."""
    scratch = scratch or Scratch()
    # torch transposes a contiguous matrix of two-byte elements in cache tiles, and one of single bytes element by
    # element, eight times slower.
    wide = scratch.cast(matrix, torch.int16 if matrix.dtype == torch.int8 else matrix.dtype)
    turned = scratch.empty("transpose", tuple(matrix.T.shape), wide.dtype).copy_(wide.T)
    return scratch.cast(turned, matrix.dtype)


def hub_rows(
    weight: torch.Tensor, scales: torch.Tensor | None, dtype: str, transposed: bool, scratch: Scratch | None = None
) -> torch.Tensor:
    """A piece of an array as the hub holds it.

    Args:
        weight: (K, n) as stored: n columns of a matrix that is transposed, or rows of one that is not.
        scales: (G, n) bfloat16 if the weight is to be dequantised.
        dtype: "float32", "bfloat16" or "int8" of the result.
        transposed: whether the result is (n, K).
        scratch: where the result and the temporaries may lie.
    """
    scratch = scratch or Scratch()
    if scales is not None:
        weight = dequantise(scratch.cast(weight, torch.float32), scales)
    weight = scratch.cast(weight, TORCH_DTYPE[dtype])
    return transpose(weight, scratch) if transposed else weight


def part_array(file: TensorFile, part: Part) -> RawArray:
    """The array of the file that a part comes from.

    Raises:
        CheckpointError: the part asks for scales and the file has none.
    """
    if part.field == "weight":
        return file.weight
    if file.scales is None:
        raise CheckpointError(f"{file.path}: expected scales, found none")
    return file.scales


def part_shape(file: TensorFile, part: Part) -> tuple[int, int]:
    """(rows, columns) of a part in the output; a vector is one row."""
    shape = part_array(file, part).shape
    if len(shape) == 1:
        return (1, shape[0])
    return (shape[-1], shape[-2]) if part.entry.kind.transposed else (shape[-2], shape[-1])


@dataclass(frozen=True)
class Slab:
    """The output rows [start, stop) of a part, in memory, as xAI stores them.

    weight: (K, stop - start), or (stop - start, N) where the kind is not transposed. scales: (G, stop - start), or
    None.
    """

    part: Part
    start: int
    stop: int
    weight: torch.Tensor
    scales: torch.Tensor | None

    def blocks(self, block_elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
        """Ranges of output rows with at most `block_elements` elements each (at least one row)."""
        columns = self.weight.numel() // (self.stop - self.start)
        step = max(1, block_elements // columns)
        for first in range(self.start, self.stop, step):
            yield first, min(first + step, self.stop)

    def rows(self, first: int, last: int, dtype: str, scratch: Scratch | None = None) -> torch.Tensor:
        """Output rows [first, last) in `dtype`, contiguous: in the scratch or in this slab."""
        piece = slice(first - self.start, last - self.start)
        transposed = self.part.entry.kind.transposed
        if not transposed:
            return hub_rows(self.weight[piece], None, dtype, False, scratch)
        scales = self.scales[:, piece] if self.scales is not None and dtype != "int8" else None
        return hub_rows(self.weight[:, piece], scales, dtype, True, scratch)

    def scale_rows(self, first: int, last: int) -> torch.Tensor:
        """The scales of output rows [first, last), bfloat16 (last - first, G)."""
        assert self.scales is not None
        return self.scales[:, first - self.start : last - self.start].T.contiguous()


def slab_ranges(file: TensorFile, part: Part, slab_bytes: int = SLAB_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges of output rows of a part, each at most `slab_bytes` in the file (at least one row), in order."""
    rows, columns = part_shape(file, part)
    step = max(1, slab_bytes // (columns * ITEMSIZE[part_array(file, part).dtype]))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_slab(file: TensorFile, part: Part, start: int, stop: int, buffer: np.ndarray | None = None) -> Slab:
    """Reads the output rows [start, stop) of a part.

    A matrix that is transposed and larger than a slab is read as a band of columns, from blocks of rows.

    Args:
        buffer: uint8, memory for the slab; new memory if it is None or too small.

    Raises:
        CheckpointError: the file became shorter or cannot be read any more.
    """
    array = part_array(file, part)
    itemsize = ITEMSIZE[array.dtype]
    if buffer is not None and buffer.nbytes < (stop - start) * part_shape(file, part)[1] * itemsize:
        buffer = None
    lead = () if part.expert is None else (part.expert,)
    if len(array.shape) == 1:
        return Slab(part, 0, 1, as_tensor(array.read()[None], array.dtype), None)
    if not part.entry.kind.transposed:
        return Slab(part, start, stop, as_tensor(array.read_rows(lead, start, stop, buffer), array.dtype), None)
    inputs, outputs = array.shape[-2:]
    if (start, stop) == (0, outputs):
        weight = array.read_rows(lead, 0, inputs, buffer)
    else:
        shape, dtype = (inputs, stop - start), NUMPY_DTYPE[array.dtype]
        weight = np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer)
        step = max(1, BAND_READ_BYTES // (itemsize * outputs))
        for first in range(0, inputs, step):
            last = min(first + step, inputs)
            weight[first:last] = array.read_rows(lead, first, last)[:, start:stop]
    scales = None
    if part.field == "weight" and file.scales is not None:
        scales = as_tensor(file.scales.read_rows(lead, 0, file.scales.shape[-2])[:, start:stop], "bfloat16")
    return Slab(part, start, stop, as_tensor(weight, array.dtype), scales)
