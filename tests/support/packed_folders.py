"""Folders in the format of compressed-tensors, written with few lines of their own."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def largest_group(folder: Path) -> int:
    """The largest group size that divides every scale block of an int8 folder with one scale per block."""
    scales = {name: value for name, value in tensors(folder).items() if name.endswith("_scale")}
    weights = tensors(folder)
    blocks = {weights[name.removesuffix("_scale")].shape[1] // value.shape[1] for name, value in scales.items()}
    return next(size for size in (128, 64, 32, 16, 8, 4, 2, 1) if all(block % size == 0 for block in blocks))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def pack_plainly(values: torch.Tensor, bits: int) -> torch.Tensor:
    """values: N K, int8 -> N K*bits/32, int32, by the definition: shifts and sums."""
    per_word = 32 // bits
    words = (values.long() + 2 ** (bits - 1)).unflatten(-1, (-1, per_word))
    word = (words << (torch.arange(per_word) * bits)).sum(dim=-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def pack_int8_folder(folder: Path, out: Path) -> Path:
    """A W8A16 folder from one with int8 weights and one scale per block, `weight` and `weight_scale`."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    group, found, packed = largest_group(folder), tensors(folder), {}
    for name, value in found.items():
        if name.endswith("_scale"):
            repeats = found[name.removesuffix("_scale")].shape[1] // value.shape[1] // group
            packed[name] = value.repeat_interleave(repeats, dim=1)
        elif value.dtype == torch.int8:
            packed[f"{name}_packed"] = pack_plainly(value, 8)
            packed[f"{name}_shape"] = torch.tensor(value.shape)
        else:
            packed[name] = value
    save_file(packed, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", r"re:.*block_sparse_moe\.gate$"],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
