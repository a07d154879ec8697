"""The safetensors files of a folder, planned from sizes: no tensor is in memory to write one.

A shard is byte for byte what `safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})` writes: eight
bytes with the length of the header, the header as compact JSON padded with blanks to eight bytes, the tensors by dtype
and name. So every offset is known before the first byte, and blocks can be written in place from many threads.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from grok1.conversion.names import HubTensor


# The library's names, in its order inside a file.
SAFETENSORS_DTYPE = {"int64": "I64", "float32": "F32", "int32": "I32", "bfloat16": "BF16", "int8": "I8"}
DTYPE_ORDER = tuple(SAFETENSORS_DTYPE)
INDEX_NAME = "model.safetensors.index.json"

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {f"{_prefix}B": 1000**_power, f"{_prefix}IB": 1024**_power}


@dataclass(frozen=True)
class Shard:
    """One file of the folder.

    Args:
        name: its final name.
        tensors: in the order of the file.
        header: the bytes before the first tensor.
        offsets: the position of each tensor in the file, by name.
    """

    name: str
    tensors: tuple[HubTensor, ...]
    header: bytes
    offsets: dict[str, int]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def make_shard(name: str, tensors: Iterable[HubTensor]) -> Shard:
    """Lays the tensors out in a file as the safetensors library would."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (DTYPE_ORDER.index(tensor.dtype), tensor.name)))
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        described[tensor.name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    offsets = {}
    position = len(header)
    for tensor in ordered:
        offsets[tensor.name] = position
        position += tensor.nbytes
    return Shard(name, ordered, header, offsets)


def plan_shards(tensors: Iterable[HubTensor], max_shard_size: int) -> list[Shard]:
    """Fills shards with the tensors in their order, each to at most `max_shard_size` bytes of tensors.

    A tensor that is larger has a shard of its own. The last tensor of the table, the final norm, is in the last shard.
    """
    groups = list(_groups(tensors, max_shard_size))
    return [
        make_shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _groups(tensors: Iterable[HubTensor], max_shard_size: int) -> Iterator[list[HubTensor]]:
    group: list[HubTensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.nbytes > max_shard_size:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def index_text(shards: Iterable[Shard]) -> str:
    """The text of model.safetensors.index.json, in the form of `save_pretrained`.

    `total_size` counts the bytes of all tensors, `total_parameters` the weights of the model: neither a copy of the
    tied head nor the scales of quantised weights.
    """
    shards = list(shards)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.parameters for tensor in tensors),
            "total_size": sum(tensor.nbytes for tensor in tensors),
        },
        "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def parse_size(size: int | str) -> int:
    """A number of bytes: 5000000000, "5GB" (powers of 1000) or "5GiB" (powers of 1024).

    Raises:
        ValueError: it is not a positive number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    unit = _UNITS.get(match[2].upper() or "B") if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"max_shard_size: expected a size such as 5GB, 800MB or 4GiB, found {size!r}")
    return int(float(match[1]) * unit)
