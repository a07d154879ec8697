"""Where a tensor of a hub folder lies in a GGUF file, and what lies there."""

import re
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from grok1.conversion.names import HEAD_NAME, KINDS, LAYER_PREFIX


def gguf_place(name: str) -> tuple[str, int | None]:
    """The GGUF tensor of a hub tensor, and its expert there: the experts of a layer are one tensor."""
    if name == HEAD_NAME:
        return "output.weight", None
    for kind in KINDS.values():
        prefix = LAYER_PREFIX["hub"] if name.startswith("model.layers.") else ""
        pattern = re.escape(prefix + kind.hub).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)")
        found = re.fullmatch(pattern, name)
        if found:
            groups = found.groupdict()
            layer = LAYER_PREFIX["gguf"].format(n=groups["n"]) if "n" in groups else ""
            return layer + kind.gguf, int(groups["e"]) if "e" in groups else None
    raise KeyError(name)


def read_gguf(file: Path) -> dict[str, tuple[GGMLQuantizationType, torch.Tensor]]:
    """The type of every tensor of a GGUF file, and its values in float32."""
    return {
        tensor.name: (tensor.tensor_type, torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))))
        for tensor in GGUFReader(file).tensors
    }
