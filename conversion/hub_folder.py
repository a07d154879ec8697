"""Reads a converted folder: where each tensor lies in its safetensors files. Only headers are read."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from grok1.conversion.names import ITEMSIZE
from grok1.conversion.shards import INDEX_NAME, SAFETENSORS_DTYPE
from grok1.conversion.xai.checkpoint import RawArray, link_out_of
from grok1.errors import ConversionError


SINGLE_NAME = "model.safetensors"
# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
_DTYPE = {code: name for name, code in SAFETENSORS_DTYPE.items()}


def read_hub_folder(folder: str | os.PathLike[str]) -> dict[str, RawArray]:
    """Every tensor of the folder by its name: of the shards that the index names, or of model.safetensors.

    Raises:
        ConversionError: with every problem: no weights, a shard that is missing, truncated or outside of the folder, a
            header that does not describe its file, a dtype that Grok-1 is not stored in, an index that disagrees.
    """
    folder = Path(folder)
    weight_map: dict[str, str] | None = None
    problems: list[str] = []
    if (folder / INDEX_NAME).is_file():
        weight_map = _weight_map(folder / INDEX_NAME)
        shards = sorted(set(weight_map.values()))
    elif (folder / SINGLE_NAME).is_file():
        shards = [SINGLE_NAME]
    else:
        raise ConversionError(
            f"{folder}: no weights", [f"expected {INDEX_NAME} or {SINGLE_NAME} in {folder}, found neither"]
        )
    tensors: dict[str, RawArray] = {}
    for shard in shards:
        try:
            found = _read_shard(folder, shard)
        except ValueError as error:
            problems.append(f"{shard}: {error}")
            continue
        problems += [f"{name}: expected in one shard, found in {shard} too" for name in tensors.keys() & found.keys()]
        tensors |= found
    if weight_map is not None and not problems:
        problems += [f"{name}: expected in {weight_map[name]}, found nowhere" for name in weight_map.keys() - tensors]
        problems += [
            f"{name}: expected in {INDEX_NAME}, found only in a shard" for name in tensors.keys() - weight_map
        ]
        problems += [
            f"{name}: expected in {weight_map[name]}, found in {tensors[name].file.name}"
            for name in tensors.keys() & weight_map.keys()
            if tensors[name].file.name != weight_map[name]
        ]
    if problems:
        raise ConversionError(f"{folder}: its weights cannot be read", sorted(problems))
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path}: expected an index with a weight_map, found none ({error})") from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ConversionError(f"{path}: expected a weight_map from tensors to files, found something else")
    return weight_map


def _read_shard(folder: Path, name: str) -> dict[str, RawArray]:
    """The tensors of one safetensors file. Raises ValueError with what was expected and found."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file in the folder, found a path")
    outside = link_out_of(path)
    if outside:
        raise ValueError(f"expected a file of the folder, found a link out of it, to {outside}")
    if not path.is_file():
        raise ValueError("expected a file, found none")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"expected a safetensors header in the file, found one of {length} bytes in {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise ValueError("expected a safetensors header in JSON, found something else") from None
    if not isinstance(header, dict):
        raise ValueError("expected a safetensors header, found something else")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for tensor, described in header.items():
        array, begin, end = _located(path, tensor, described, 8 + length)
        tensors[tensor] = array
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"expected a tensor at byte {position} of the data, found the next one at {begin}")
        position = end
    if size != 8 + length + position:
        raise ValueError(f"expected {8 + length + position} bytes, found {size}")
    return tensors


def _located(path: Path, name: str, described: Any, data: int) -> tuple[RawArray, int, int]:
    try:
        code, shape, (begin, end) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        integers = all(type(value) is int and value >= 0 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        integers = False
    if not integers:
        raise ValueError(f"expected dtype, shape and data_offsets of {name}, found something else")
    if code not in _DTYPE:
        raise ValueError(f"expected {name} as one of {', '.join(sorted(_DTYPE))}, found {code}")
    nbytes = math.prod(shape) * ITEMSIZE[_DTYPE[code]]
    if end - begin != nbytes:
        raise ValueError(f"expected {nbytes} bytes for {name} {code} {shape}, found {end - begin}")
    return RawArray(path, _DTYPE[code], shape, data + begin), begin, end
