"""GGUF files, as llama.cpp reads them: their keys and tensors, through the gguf package of ggml-org.

The package is an extra: `pip install modeling-grok1[gguf]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from grok1.arrays import RawArray, count_nonfinite
from grok1.errors import ConversionError
from grok1.files import BLOCK_BYTES, StoredTensor


SUFFIX = ".gguf"
# The description in a file that holds xAI's numbers as they are.
LOSSLESS = "xAI's own int8 values and scales, and its float32 values: nothing was rounded."
SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Types of tensors by the names that the other formats have for them.
TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}


@cache
def gguf_package() -> ModuleType:
    """The gguf package. Raises ConversionError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConversionError(
            "GGUF files need the gguf package, which is not installed.",
            next_step="Install it: pip install 'modeling-grok1[gguf]'",
        ) from None
    return gguf


def quantization_type(dtype: str) -> Any:
    """The gguf package's type of a dtype."""
    return gguf_package().GGMLQuantizationType[TYPES[dtype]]


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file, or all files of a split one.

    Args:
        files: in their order.
        keys: the metadata, of the first file where the model is split.
        tensors: of all files by their names. Their dtype is one of `TYPES`, or the gguf package's name of another.
    """

    files: tuple[Path, ...]
    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file or a folder of them."""
    return path.suffix == SUFFIX if path.is_file() else path.is_dir() and any(path.glob(f"*{SUFFIX}"))


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The files of one model: the path and the other splits beside it, or those in a folder.

    Raises:
        ConversionError: there are none, or a folder holds several models, or a split is missing.
    """
    folder = path if path.is_dir() else path.parent
    given = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    stems = {found[1] if (found := SPLIT_NAME.fullmatch(file.name)) else file.stem for file in given}
    if len(stems) != 1:
        names = ", ".join(file.name for file in given) or "none"
        raise ConversionError(f"{path}: expected one GGUF model, found {names}", next_step="Name one file.")
    found = SPLIT_NAME.fullmatch(given[0].name)
    if found is None:
        files = [given[0]]
    else:
        files = [folder / f"{found[1]}-{n:05d}-of-{found[3]}{SUFFIX}" for n in range(1, int(found[3]) + 1)]
    missing = [f"{file.name}: expected a file, found none" for file in files if not file.is_file()]
    if missing:
        raise ConversionError(f"{path}: not a whole GGUF model", missing)
    return tuple(files)


def read_gguf(path: Path) -> GgufModel:
    """Reads the headers of a GGUF file and of the other splits of its model.

    Raises:
        ConversionError: a file is missing or is not a GGUF file, or the splits are not those of one model.
    """
    files = gguf_files(path)
    names = {value: key for key, value in TYPES.items()}
    keys: dict[str, Any] = {}
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for number, file in enumerate(files):
        reader = _reader(file)
        found = _keys(reader)
        keys = keys or found
        if len(files) > 1 and (found.get("split.no"), found.get("split.count")) != (number, len(files)):
            problems.append(
                f"{file.name}: expected split {number} of {len(files)}, found {found.get('split.no')} of "
                f"{found.get('split.count')}"
            )
        for tensor in reader.tensors:
            if tensor.name in tensors:
                problems.append(f"{file.name}: expected {tensor.name} once, found it in {tensors[tensor.name].file}")
            dtype = names.get(tensor.tensor_type.name, tensor.tensor_type.name)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            tensors[tensor.name] = StoredTensor(file, dtype, shape, int(tensor.data_offset), int(tensor.n_bytes))
    if problems:
        raise ConversionError(f"{path}: not a whole GGUF model", problems)
    return GgufModel(files, keys, tensors)


def gguf_arrays(model: GgufModel) -> dict[str, RawArray]:
    """Every tensor of a model as an array in its file; one of blocks has their type as its dtype.

    Raises:
        ConversionError: a tensor is of a type that is not read here.
    """
    unknown = [
        f"{name}: expected one of {', '.join(TYPES.values())}, found {tensor.dtype}"
        for name, tensor in model.tensors.items()
        if tensor.dtype not in TYPES
    ]
    if unknown:
        raise ConversionError(f"{model.files[0]}: its tensors cannot be read", unknown)
    return {
        name: RawArray(tensor.file, tensor.dtype, tensor.shape, tensor.offset)
        for name, tensor in model.tensors.items()
    }


def file_keys(file: Path) -> dict[str, Any]:
    """The metadata of one file. Raises ConversionError if it is not a GGUF file."""
    return _keys(_reader(file))


def _keys(reader: Any) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def _reader(file: Path) -> Any:
    gguf = gguf_package()
    try:
        return gguf.GGUFReader(file)
    except OSError as error:
        raise ConversionError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ConversionError(
            f"{file}: not a whole GGUF file", [f"{file.name}: {type(error).__name__}: {error}"], "Download it again."
        ) from None


def dequantized(data: np.ndarray | memoryview, dtype: str) -> np.ndarray:
    """The float32 numbers of the bytes of whole blocks, as the gguf package computes them."""
    gguf = gguf_package()
    return gguf.dequantize(np.frombuffer(data, np.uint8), quantization_type(dtype))


def nonfinite_numbers(data: bytes | memoryview, dtype: str) -> int:
    """NaN and infinite numbers among the bytes of a tensor: of block types those of scales."""
    if dtype not in BLOCK_BYTES:
        return count_nonfinite(data, dtype)
    scales = np.frombuffer(data, np.uint8).reshape(-1, BLOCK_BYTES[dtype])[:, :2]
    return int(np.count_nonzero(~np.isfinite(np.ascontiguousarray(scales).view("<f2"))))


def without_arrays(keys: dict[str, Any]) -> dict[str, Any]:
    """The keys, without those that hold an entry for each token."""
    return {key: value for key, value in keys.items() if not _is_long(value)}


def _is_long(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 16
