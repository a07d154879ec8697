"""A checkpoint in xAI's format with random numbers, whose scale blocks are multiples of GGUF's 32 inputs."""

from pathlib import Path

import numpy as np

from grok1.conversion.names import checkpoint_entries
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from modeling_grok1 import GrokConfig


# Twelve layers, so that xAI's lexicographic order of them is not the numeric one.
CONFIG = GrokConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
BLOCKS = 2


def write_random_checkpoint(folder: Path, first_scale: int | None = None) -> Path:
    """Writes config.json and ckpt-0/.

    Args:
        first_scale: the bits of a bfloat16 that becomes the first scale of tensor00005_000.
    """
    random = np.random.default_rng(0)
    (folder / "ckpt-0").mkdir(parents=True)
    CONFIG.to_json_file(folder / "config.json")
    for entry in checkpoint_entries(CONFIG):
        path = folder / "ckpt-0" / entry.file
        if not entry.kind.quantised:
            values = random.standard_normal(entry.shape, dtype=np.float32)
            write_tensor_file(path, tensor_frame(entry.shape), [values])
            continue
        scales_shape = entry.scales_shape(BLOCKS if entry.kind.scale_blocks > 1 else 1)
        # 2^-11 to 2^-7, the sign always positive.
        scales = random.integers(0x3A00, 0x3C00, scales_shape, dtype=np.uint16)
        if first_scale is not None and entry.index == 5:
            scales[(0,) * scales.ndim] = first_scale
        weight = random.integers(-127, 128, entry.shape, dtype=np.int8)
        write_tensor_file(path, tensor_frame(entry.shape, scales_shape), [weight], lambda scales=scales: scales)
    return folder
