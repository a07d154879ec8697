"""The safetensors files of a folder, planned from sizes: no tensor is in memory to write one.

A shard is byte for byte what `safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})` writes: eight
bytes with the length of the header, the header as compact JSON padded with spaces to eight bytes, the tensors by dtype
and name. So every offset is known before the first byte, and blocks can be written in place from many threads.
`gguf_header` plans GGUF files in the same form.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from grok1.conversion.names import HubTensor
from grok1.files import SAFETENSORS_NAME


# The order of the safetensors library inside a file.
DTYPE_ORDER = ("int64", "float32", "int32", "bfloat16", "int8")


@dataclass(frozen=True)
class Shard:
    """One file of the folder.

    Args:
        name: its final name.
        tensors: in the order of the file.
        header: the bytes before the first tensor.
        offsets: the position of each tensor in the file, by name.
        nbytes: of the whole file.
        description: what a GGUF file says of its numbers.
    """

    name: str
    tensors: tuple[HubTensor, ...]
    header: bytes
    offsets: dict[str, int]
    nbytes: int
    description: str = ""


def make_shard(name: str, tensors: Iterable[HubTensor]) -> Shard:
    """Lays the tensors out in a file as the safetensors library would."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (DTYPE_ORDER.index(tensor.dtype), tensor.name)))
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        described[tensor.name] = {
            "dtype": SAFETENSORS_NAME[tensor.dtype],
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
    return Shard(name, ordered, header, offsets, position)


def plan_shards(tensors: Iterable[HubTensor], max_shard_size: int) -> list[Shard]:
    """Fills shards with the tensors in their order, each to at most `max_shard_size` bytes of tensors.

    A tensor that is larger has a shard of its own. The last tensor of the table, the final norm, is in the last shard.
    """
    groups = list(fill_shards(tensors, max_shard_size))
    return [
        make_shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def fill_shards(tensors: Iterable[HubTensor], max_shard_size: int) -> Iterator[list[HubTensor]]:
    """The tensors of each shard, in their order."""
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
