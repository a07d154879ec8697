"""The blocks of GGUF: 32 values of a row and their scale in float16.

xAI's int8 fits into q8_0 as it is: a block of 32 inputs has one of xAI's scales, because those cover multiples of 32
inputs, and float16 holds a bfloat16 exactly from 2^-17 to 65280. int4 (modeling_grok1/packing_grok1.py) with groups of
32 inputs fits into q4_0.
"""

from __future__ import annotations

import numpy as np
import torch

from grok1.conversion.layout import Scratch
from grok1.errors import ConversionError
from grok1.files import BLOCK_BYTES, BLOCK_SIZE
from grok1.gguf_files import gguf_package
from modeling_grok1.packing_grok1 import repeat_scales


# Values that the gguf package quantises at once: its temporaries take some 20 bytes each.
QUANTISED_VALUES = 2**18
ROUNDING = "`--round-scales` rounds them; the file is then not lossless. `--dtype bfloat16` has no scales."


def inexact_scales(scales: torch.Tensor) -> int:
    """How many scales (bfloat16) float16 does not hold."""
    return int((scales.to(torch.float16).to(torch.bfloat16) != scales).sum())


def overflowing_scales(scales: torch.Tensor) -> int:
    """How many finite scales (bfloat16) are infinite in float16."""
    return int((torch.isfinite(scales) & ~torch.isfinite(scales.to(torch.float16))).sum())


def float16_scales(name: str, scales: torch.Tensor, round_scales: bool) -> torch.Tensor:
    """The scales of a tensor in float16.

    Raises:
        ConversionError: float16 does not hold one of them, and it may not be rounded or is too large.
    """
    wrong = overflowing_scales(scales) if round_scales else inexact_scales(scales)
    if wrong:
        raise ConversionError(
            f"{name}: cannot be written as blocks of GGUF",
            [f"expected scales that float16 holds, found {wrong:,} in {len(scales):,} rows that it does not hold"],
            "" if round_scales else ROUNDING,
        )
    return scales.to(torch.float16)


def q8_0_rows(
    name: str, values: torch.Tensor, scales: torch.Tensor, round_scales: bool, scratch: Scratch
) -> torch.Tensor:
    """values: int8 (n, K); scales: bfloat16 (n, G) -> uint8 (n, K/32 * 34): of each block the scale, then the values.

    Raises:
        ConversionError: see `float16_scales`.
    """
    return _joined("q8_0", values, float16_scales(name, scales, round_scales), scratch)


def q4_0_rows(
    name: str, values: torch.Tensor, scales: torch.Tensor, round_scales: bool, scratch: Scratch
) -> torch.Tensor:
    """values: int8 (n, K), from -8 to 7; scales: bfloat16 (n, K/32) -> uint8 (n, K/32 * 18).

    A byte holds value + 8 of two inputs: of input i in the low and of input i + 16 in the high four bits.

    Raises:
        ConversionError: see `float16_scales`.
    """
    nibbles = (values + 8).view(torch.uint8).unflatten(-1, (-1, 2, BLOCK_SIZE // 2))
    packed = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).flatten(-2)
    return _joined("q4_0", packed, float16_scales(name, scales, round_scales), scratch)


def rounded_q8_0_rows(rows: torch.Tensor) -> torch.Tensor:
    """rows: float32 (n, K) -> uint8 (n, K/32 * 34), quantised as llama.cpp does it."""
    gguf = gguf_package()
    step = max(1, QUANTISED_VALUES // rows.shape[1])
    pieces = [gguf.quantize(piece.numpy(), gguf.GGMLQuantizationType.Q8_0) for piece in rows.split(step)]
    return torch.from_numpy(np.concatenate(pieces))


def _joined(block_type: str, data: torch.Tensor, scales: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """Scale and data of each block, side by side. Written as 16-bit numbers: single bytes take twice as long."""
    rows, width = data.shape[0], BLOCK_BYTES[block_type] // 2
    words = data.contiguous().view(torch.int16).view(rows, -1, width - 1)
    blocks = scratch.empty("blocks", (rows, words.shape[1], width), torch.int16)
    blocks[..., 0] = repeat_scales(scales.view(torch.int16), words.shape[1])
    blocks[..., 1:] = words
    return blocks.view(rows, -1).view(torch.uint8)


def split_q8_0(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reverse of `q8_0_rows`: uint8 (n, K/32 * 34) -> values, int8 (n, K), and scales, float16 (n, K/32)."""
    parts = blocks.unflatten(-1, (-1, BLOCK_BYTES["q8_0"]))
    scales = parts[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return parts[..., 2:].contiguous().view(torch.int8).flatten(-2), scales
