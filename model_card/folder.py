"""A converted folder as its files describe it: config.json, the index and the headers of the shards."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling_grok1.conversion.errors import ConversionError


INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The safetensors library refuses longer headers, so do we.
MAX_HEADER = 100_000_000
# Safetensors' names of the dtypes that a Grok-1 folder may hold, as torch spells them, with their bytes.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8", "U8": "uint8"}
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `nbytes` bytes from byte `offset` of `file` on, row-major, little-endian."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class HubFolder:
    """What a folder holds. `problems` are the contradictions between its files, one line each; empty is sound."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    shards: dict[str, int]
    problems: list[str] = field(default_factory=list)

    def require_sound(self) -> HubFolder:
        """Itself, or a ConversionError that lists every problem."""
        if self.problems:
            raise ConversionError(
                f"{self.path} is not a whole converted folder:",
                self.problems,
                "Convert again, or fetch the missing files; `grok1 verify` names damaged ones.",
            )
        return self


def read_folder(path: Path) -> HubFolder:
    """Read config.json, the index and every shard's header.

    Raises:
        ConversionError: there is no folder, no config.json, or no weights in it.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise ConversionError(
            f"{path}: expected a converted folder with config.json, found "
            f"{'none' if path.is_dir() else 'no such folder'}.",
            next_step="Make one with `grok1 convert CKPT OUT`.",
        )
    problems: list[str] = []
    config = _read_json(path / "config.json", problems)
    placed: dict[str, str] = {}
    if (path / INDEX_NAME).is_file():
        weight_map = _read_json(path / INDEX_NAME, problems).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            problems.append(f"{INDEX_NAME}: expected a `weight_map` from tensor names to file names, found none")
        else:
            placed = weight_map
        names = sorted(set(placed.values()))
    elif (path / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        raise ConversionError(
            f"{path}: expected {SINGLE_NAME} or {INDEX_NAME}, found neither.",
            next_step="The folder holds no weights: convert again with `grok1 convert CKPT OUT`.",
        )

    tensors: dict[str, StoredTensor] = {}
    shards: dict[str, int] = {}
    for name in names:
        file = path / name
        if Path(name).name != name:
            problems.append(f"{INDEX_NAME}: expected plain file names, found {name!r}")
            continue
        if not file.is_file():
            problems.append(f"{name}: named by {INDEX_NAME}, missing")
            continue
        shards[name] = file.stat().st_size
        for tensor in _read_header(file, problems):
            if tensor.name in tensors:
                problems.append(f"{tensor.name}: in {tensors[tensor.name].file} and again in {name}")
            tensors[tensor.name] = tensor
            if placed and placed.get(tensor.name) != name:
                problems.append(f"{tensor.name}: {INDEX_NAME} says {placed.get(tensor.name)}, found in {name}")
    problems += [
        f"{name}: {INDEX_NAME} says {file}, not in it"
        for name, file in placed.items()
        if file in shards and name not in tensors
    ]
    problems += [
        f"{file.name}: not named by {INDEX_NAME}"
        for file in sorted(path.glob("*.safetensors"))
        if file.name not in names
    ]
    return HubFolder(path, config, tensors, shards, problems)


def _read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(f"{file.name}: expected JSON, found {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file.name}: expected a JSON object, found {type(content).__name__}")
        return {}
    return content


def _read_header(file: Path, problems: list[str]) -> Iterator[StoredTensor]:
    """The tensors of one shard. Their bytes must fill the file: no gap, no overlap, nothing behind the last."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            problems.append(f"{file.name}: expected a safetensors header, found {head.hex() or 'an empty file'}")
            return
        try:
            header = json.loads(stream.read(length))
            entries = sorted(
                (
                    (name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
                    for name, entry in header.items()
                    if name != "__metadata__"
                ),
                key=lambda entry: entry[3],
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problems.append(f"{file.name}: the safetensors header cannot be read ({type(error).__name__}: {error})")
            return
    position = 0
    for name, code, shape, begin, end in entries:
        dtype = DTYPES.get(code)
        if dtype is None:
            problems.append(f"{name} in {file.name}: expected a dtype of {sorted(DTYPES)}, found {code}")
            position = end
            continue
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        if begin != position or end - begin != nbytes:
            problems.append(
                f"{name} in {file.name}: expected bytes {position} to {position + nbytes}, found {begin} to {end}"
            )
        position = end
        yield StoredTensor(name, file.name, dtype, shape, 8 + length + begin, nbytes)
    if 8 + length + position != size:
        problems.append(f"{file.name}: expected {8 + length + position:,} bytes, found {size:,}")
