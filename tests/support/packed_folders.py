"""Folders in the format of compressed-tensors: their tensors, and packing by its definition."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def pack_plainly(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values: N K, int8 -> N K*bits/32, int32, by the definition: shifts and sums."""
    per_word = 32 // bits
    words = (values.long() + 2 ** (bits - 1)).unflatten(-1, (-1, per_word))
    word = (words << (torch.arange(per_word) * bits)).sum(dim=-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpacked_weights(folder: Path, bits: int) -> dict[str, torch.Tensor]:
    """The weights of a packed folder in float64, by the definition of its format: scale times value, where the words
    hold value + 2^(bits-1), the first in the lowest bits."""
    stored, weights = tensors(folder), {}
    for name, tensor in stored.items():
        path = name.removesuffix(".weight_packed")
        if path != name:
            words = tensor.long().unsqueeze(-1) >> (bits * torch.arange(32 // bits))
            values = (words & (2**bits - 1)).flatten(-2) - 2 ** (bits - 1)
            scale = stored[f"{path}.weight_scale"].double()
            grouped = values.unflatten(-1, (scale.shape[-1], -1))
            weights[f"{path}.weight"] = (grouped * scale.unsqueeze(-1)).flatten(-2)
        elif name.endswith(".weight"):
            weights[name] = tensor.double()
    return weights
