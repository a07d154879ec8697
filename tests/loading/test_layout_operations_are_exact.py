"""Dequantising, turning and casting against plain numpy, whatever the pieces they are done in."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_conversion import bfloat16_bits
from xai_files import float_file, int8_file

from grok1.conversion.layout import as_bytes, dequantise, read_slab, slab_ranges, transpose
from grok1.conversion.names import KINDS, checkpoint_entries, hub_tensors
from grok1.conversion.xai.checkpoint import read_tensor_file
from modeling_grok1.configuration_grok1 import GrokConfig


def bits_of(scales: torch.Tensor) -> np.ndarray:
    return scales.view(torch.int16).numpy().view(np.uint16)


def every_product() -> tuple[torch.Tensor, torch.Tensor]:
    """All 256 int8 values against scales of every mantissa and many exponents, subnormal ones too."""
    bits = np.concatenate([np.arange(e << 7, (e << 7) + 128) for e in (0, 1, 60, 100, 119, 120, 127, 140, 200, 246)])
    scales = torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16)[None, :]
    weight = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(-1, scales.shape[-1]).contiguous()
    return weight, scales


def test_float32_is_the_exact_product():
    weight, scales = every_product()
    exact = weight.numpy().astype(np.float64) * scales.to(torch.float64).numpy()
    product = dequantise(weight, scales).numpy()
    assert product.dtype == np.float32
    np.testing.assert_array_equal(product.astype(np.float64), exact)


def test_bfloat16_is_the_product_rounded_once_to_nearest_even():
    weight, scales = every_product()
    exact = weight.numpy().astype(np.float32) * scales.to(torch.float32).numpy()
    expected = bfloat16_bits(exact)
    found = bits_of(dequantise(weight, scales).to(torch.bfloat16))
    np.testing.assert_array_equal(found, expected)
    # Halves between two neighbours occur, so rounding to even is really tried.
    halves = (exact.view(np.uint32) & 0xFFFF) == 0x8000
    assert halves.sum() > 100


def test_scale_row_g_covers_contiguous_input_rows():
    weight = torch.ones(12, 2, dtype=torch.int8)
    scales = torch.tensor([[1, 10], [2, 20], [3, 30]], dtype=torch.bfloat16)
    expected = [[g + 1, 10 * (g + 1)] for g in range(3) for _ in range(4)]
    assert dequantise(weight, scales).tolist() == expected
    batched = dequantise(weight.expand(5, -1, -1), scales.expand(5, -1, -1))
    assert batched.shape == (5, 12, 2)
    assert batched[4].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (64, 64), (61, 257), (300, 5)])
def test_transpose(dtype, shape):
    matrix = torch.randint(-127, 128, shape).to(dtype)
    turned = transpose(matrix)
    assert turned.is_contiguous()
    assert torch.equal(turned, matrix.T)
    assert torch.equal(transpose(turned), matrix)
    assert bytes(as_bytes(turned)) == matrix.T.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


CONFIG = GrokConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    num_experts=3,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    slab_bytes=st.integers(1, 3000),
    block_elements=st.integers(1, 500),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    buffered=st.booleans(),
)
def test_a_tensor_is_the_same_in_whatever_pieces(tmp_path_factory, kind, slab_bytes, block_elements, dtype, buffered):
    (entry,) = (entry for entry in checkpoint_entries(CONFIG) if entry.kind.name == kind)
    random = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("pieces") / entry.file
    if entry.kind.quantised:
        weight = random.integers(-127, 128, entry.shape, dtype=np.int8)
        bits = random.integers(0x3A80, 0x3B80, entry.scales_shape(entry.kind.scale_blocks), dtype=np.uint16)
        path.write_bytes(int8_file(weight, bits))
        scales = (bits.astype(np.uint32) << 16).view(np.float32)
        blocks = scales.shape[-2]
        wide = np.repeat(scales, weight.shape[-2] // blocks, axis=-2)
        values = weight.astype(np.float32) * wide
    else:
        values = random.standard_normal(entry.shape, dtype=np.float32)
        path.write_bytes(float_file(values))
    file = read_tensor_file(path)
    for tensor in hub_tensors(CONFIG, "hub", dtype).values():
        if tensor.parts[0].entry != entry or tensor.name == "lm_head.weight" or tensor.parts[0].field == "scales":
            continue
        (part,) = tensor.parts
        expected = values if part.expert is None else values[part.expert]
        expected = expected.T if entry.kind.transposed else expected
        if tensor.dtype == "bfloat16":
            expected = bfloat16_bits(expected)
        found = b""
        buffer = np.empty(3000, np.uint8) if buffered else None
        for start, stop in slab_ranges(file, part, slab_bytes):
            slab = read_slab(file, part, start, stop, buffer)
            for first, last in slab.blocks(block_elements):
                found += bytes(as_bytes(slab.rows(first, last, tensor.dtype)))
        assert found == np.ascontiguousarray(expected).tobytes()
