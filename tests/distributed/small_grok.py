"""A Grok-1 of a few megabytes with random weights, in the hub layout."""

from pathlib import Path

import torch

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


# Weights this large make the soft-cap, the router and the multipliers matter in every logit.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
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
