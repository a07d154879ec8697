"""A Grok-1 of a few megabytes with random weights, in the hub layout."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


LAYERS = 4
# Weights this large make the soft-cap, the router and the multipliers matter in every logit.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "embedding_multiplier_scale": 8.0,
    "attn_output_multiplier": 0.25,
}


def save_small_grok(folder: Path, dtype: torch.dtype = torch.float32, **sizes) -> Path:
    torch.manual_seed(0)
    config = GrokConfig(**{**SIZES, **sizes})
    Grok1ForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def prompt(length: int = 48, batch: int = 1, vocab_size: int = 320) -> torch.Tensor:
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


HPCAI_NAMES = {
    "self_attn": "attn",
    "block_sparse_moe": "moe_block",
    ".w1.": ".linear.",
    ".w3.": ".linear_v.",
    ".w2.": ".linear_1.",
    "norm.weight": "norm.scale",
}


def rename_as_hpcai(folder: Path, out: Path) -> Path:
    """A copy of a folder with the tensor names of hpcai-tech/grok-1."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    for ours, theirs in HPCAI_NAMES.items():
        weights = {name.replace(ours, theirs): tensor for name, tensor in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
