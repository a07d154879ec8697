"""Tensor files for the tests of the reader and the writer, and Python's own unpickler to judge them."""

import io
import pickle
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.xai.checkpoint import TensorFile, read_tensor_file
from grok1.conversion.xai.writer import tensor_frame


def float_file(values: np.ndarray) -> bytes:
    """A file with a float32 array."""
    frame = tensor_frame(values.shape)
    return frame.before + values.astype("<f4").tobytes() + frame.after


def int8_file(weight: np.ndarray, scale_bits: np.ndarray) -> bytes:
    """A file with an int8 weight and scales, given as the bits of bfloat16."""
    frame = tensor_frame(weight.shape, scale_bits.shape)
    arrays = weight.astype("i1").tobytes(), scale_bits.astype("<u2").tobytes()
    return frame.before + arrays[0] + frame.between + arrays[1] + frame.after


class StubArray:
    """Stands for numpy.ndarray: keeps what pickle would have given to numpy."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class StubDtype:
    def __init__(self, code: Any, align: Any, copy: Any):
        self.code, self.state = code, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class QuantizedWeight8bit:
    weight: Any = None
    scales: Any = None


def _reconstruct(*_: Any) -> StubArray:
    return StubArray()


class StubUnpickler(pickle.Unpickler):
    """The real machine of pickle, with inert classes for the five globals; any other global is an error."""

    CLASSES = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): StubArray,
        ("numpy", "dtype"): StubDtype,
        ("ml_dtypes", "bfloat16"): "bfloat16",
        ("__main__", "QuantizedWeight8bit"): QuantizedWeight8bit,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self.CLASSES[module, name]


def unpickled(data: bytes) -> list[tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of the weight, and of the scales if there are any, as pickle itself reads them."""
    found = StubUnpickler(io.BytesIO(data)).load()
    arrays = [found] if isinstance(found, StubArray) else [found.weight, found.scales]
    names = {"f4": "float32", "i1": "int8", "bfloat16": "bfloat16"}
    result = []
    for array in arrays:
        _, shape, dtype, fortran, payload = array.state
        assert not fortran
        assert dtype.state[1] in "<|"
        result.append((names[dtype.code], shape, payload))
    return result


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="xai-files-")


def read_bytes(data: bytes, name: str = "tensor00000_000") -> TensorFile:
    """`read_tensor_file` of a file with this content."""
    path = Path(_folder().name) / name
    path.write_bytes(data)
    return read_tensor_file(path)


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("tensor*"))
