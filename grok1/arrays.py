"""Arrays inside files: their rows are read by position, in blocks as small as the caller likes, from any thread."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grok1.errors import CheckpointError
from grok1.files import BINARY, ITEMSIZE, read_into, read_model_folder


# numpy has no bfloat16: its bits are delivered as uint16.
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "uint8": np.dtype("u1"),  # rows of GGUF's blocks
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
# Of the dtypes with NaN and infinity: an unsigned integer of the same width, and the mask of the exponent's bits.
EXPONENT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float32": (np.uint32, 0x7F800000),
    "bfloat16": (np.uint16, 0x7F80),
}


@dataclass(frozen=True)
class RawArray:
    """An array inside a file: C order, little-endian, `nbytes` bytes from `offset` on.

    `dtype` is a key of `NUMPY_DTYPE`. The bits of bfloat16 are delivered as uint16.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def read_rows(self, lead: tuple[int, ...], start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Reads `array[lead][start:stop]`; safe to call from several threads.

        Args:
            lead: indices into the leading dimensions, e.g. `(expert,)` for an array (E, K, N); `()` for a matrix.
            start, stop: range of the dimension after those, 0 <= start <= stop <= its size.
            buffer: uint8, at least as many bytes as the rows; the result lies in it. Fresh memory by default.

        Raises:
            CheckpointError: the file cannot be read, or ends before the rows do (it changed meanwhile).
        """
        axis = len(lead)
        if axis >= len(self.shape) or not 0 <= start <= stop <= self.shape[axis]:
            raise IndexError(f"rows {start}:{stop} of {lead} in an array {self.shape}")
        row = 0
        for index, size in zip(lead, self.shape, strict=False):
            if not 0 <= index < size:
                raise IndexError(f"rows {start}:{stop} of {lead} in an array {self.shape}")
            row = row * size + index
        row = row * self.shape[axis] + start
        row_bytes = math.prod(self.shape[axis + 1 :]) * ITEMSIZE[self.dtype]
        shape, dtype = (stop - start, *self.shape[axis + 1 :]), NUMPY_DTYPE[self.dtype]
        rows = np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer)
        _read_exactly(self.file, self.offset + row * row_bytes, rows)
        return rows

    def read(self) -> np.ndarray:
        """Reads the whole array: for norms, routers and scales."""
        return self.read_rows((), 0, self.shape[0])


def _read_exactly(path: Path, offset: int, array: np.ndarray) -> None:
    if array.nbytes == 0:
        return
    view = array.data.cast("B")
    try:
        descriptor = os.open(path, os.O_RDONLY | BINARY)
        try:
            done = read_into(descriptor, view, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if done < len(view):
        raise CheckpointError(
            f"{path}: changed while it was being read",
            [f"{path.name}: expected at least {offset + len(view)} bytes, found {offset + done}"],
        )


def folder_arrays(folder: str | os.PathLike[str]) -> dict[str, RawArray]:
    """Every tensor of a model's folder by its name; only headers are read (`files.read_model_folder`).

    Raises:
        ConversionError: the folder holds no weights or is damaged; with every problem.
    """
    return {
        name: RawArray(tensor.file, tensor.dtype, tensor.shape, tensor.offset)
        for name, tensor in read_model_folder(folder).items()
    }


def count_nonfinite(data: bytes | memoryview | np.ndarray, dtype: str) -> int:
    """NaN and infinite numbers among the little-endian bytes of a dtype: those whose exponent bits are all set."""
    if dtype not in EXPONENT:
        return 0
    unsigned, mask = EXPONENT[dtype]
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).data.cast("B")
    width = np.dtype(unsigned).itemsize
    bits = np.frombuffer(data[: len(data) // width * width], unsigned)
    return int(np.count_nonzero((bits & mask) == mask))
