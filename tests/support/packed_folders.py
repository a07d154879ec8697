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
