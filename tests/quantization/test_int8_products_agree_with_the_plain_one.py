"""Every fast int8 product gives what dequantising the whole matrix and multiplying gives, on fresh random inputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_grok1 import quantized_grok1
from modeling_grok1.cpu_grok1 import matmul_by_reduction
from modeling_grok1.int8_grok1 import int8pack_matmul
from modeling_grok1.packing_grok1 import quantise_int8
from modeling_grok1.quantized_grok1 import (
    FrozenMatmul,
    QuantizedExperts,
    dequantise,
    grouped_matmul,
    plain_matmul,
    quantised_matmul,
)


# outputs, inputs, scale blocks
SHAPES = [(48, 64, 1), (33, 128, 8), (7, 96, 2), (160, 2048, 8)]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_int8(generator, *shape, blocks):
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(*shape[:-1], blocks, generator=generator) * 0.01 + 0.001
    return weight, scale.bfloat16()


def exact(x, weight, scale):
    """In float64, from the formula: scale g covers the inputs g*K/G .. (g+1)*K/G - 1."""
    group = weight.shape[-1] // scale.shape[-1]
    return x.double() @ (weight.double() * scale.double().repeat_interleave(group, dim=-1)).mT


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def test_dequantise_is_the_exact_product_rounded_once(generator):
    weight, scale = random_int8(generator, 3, 5, 32, blocks=4)
    scale = scale * 2**-10  # too small for float16, which the products are not
    product = weight.double() * scale.double().repeat_interleave(8, dim=-1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(dequantise(weight, scale, dtype), product.to(dtype))
    assert torch.equal(dequantise(weight, scale, torch.float32).double(), product)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("piece", [1, 1000, 2**20])
def test_the_plain_product_in_pieces_of_any_size(generator, monkeypatch, shape, piece):
    monkeypatch.setattr(quantized_grok1, "DEQUANTISED_ELEMENTS", piece)
    outputs, inputs, blocks = shape
    weight, scale = random_int8(generator, outputs, inputs, blocks=blocks)
    x = torch.randn(5, inputs, generator=generator)
    assert error(plain_matmul(x, weight, scale), exact(x, weight, scale)) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 8, 1])
def test_the_packed_product_also_of_a_memory_mapped_weight(generator, shape, rows, offset):
    """A memory-mapped weight begins at any byte; torch's own kernel crashes there."""
    outputs, inputs, blocks = shape
    weight, scale = random_int8(generator, outputs, inputs, blocks=blocks)
    memory = torch.empty(weight.numel() + 64, dtype=torch.int8)
    start = -memory.data_ptr() % 16 + offset
    moved = memory[start : start + weight.numel()].view_as(weight).copy_(weight)
    assert moved.data_ptr() % 16 == offset
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    y = int8pack_matmul(x, moved, scale)
    assert y.dtype == torch.bfloat16
    assert error(y, exact(x, weight, scale)) < 2**-8


def test_the_packed_product_of_rows_that_begin_anywhere(generator):
    weight, scale = random_int8(generator, 16, 64, blocks=1)
    x = torch.randn(4 * 64 + 1, generator=generator).bfloat16()[1:].view(4, 64)
    assert x.data_ptr() % 16 != 0
    assert error(int8pack_matmul(x, weight, scale), exact(x, weight, scale)) < 2**-8


@pytest.mark.parametrize("inputs", [16, 24, 40, 44, 100])
def test_few_bf16_rows_of_any_width(generator, inputs):
    """Torch's kernel reads past the end of rows that are no multiple of 16: those take the plain product."""
    weight, scale = random_int8(generator, 16, inputs, blocks=1)
    x = torch.randn(1, inputs, generator=generator).bfloat16()
    assert error(quantised_matmul(x, weight, scale), exact(x, weight, scale)) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (24, 8192, 8), (22, 8192, 8)])
def test_the_compiled_decode_product(generator, shape, dtype):
    """What torch.compile fuses, here eagerly; x may be one row seen several times."""
    outputs, inputs, blocks = shape
    weight, scale = random_int8(generator, 4, outputs, inputs, blocks=blocks)
    x = torch.randn(1, inputs, generator=generator).to(dtype).expand(2, -1)
    y = matmul_by_reduction(x, weight, torch.tensor([3, 1]), scale)
    assert y.dtype == dtype
    expected = torch.stack([exact(x[0], weight[3], scale[3]), exact(x[0], weight[1], scale[1])])
    assert error(y, expected) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_and_the_rows_of_no_expert(generator, dtype):
    weight, scale = random_int8(generator, 4, 40, 64, blocks=2)
    x = torch.randn(30, 64, generator=generator).to(dtype)
    offsets = torch.tensor([0, 3, 3, 25], dtype=torch.int32)
    for product in (grouped_matmul, torch.ops.grok1.quantised_grouped_matmul):
        y = product(x, weight, scale, offsets)
        assert error(y[:3], exact(x[:3], weight[1], scale[1])) < (1e-6 if dtype == torch.float32 else 2**-7)
        assert error(y[3:25], exact(x[3:25], weight[3], scale[3])) < (1e-6 if dtype == torch.float32 else 2**-7)
        assert (y[25:] == 0).all()


@pytest.mark.parametrize("blocks", [1, 4])
def test_the_gradient_for_x_is_that_of_the_dequantised_matrix(generator, blocks):
    weight, scale = random_int8(generator, 24, 32, blocks=blocks)
    x = torch.randn(6, 32, generator=generator, requires_grad=True)
    grad = torch.randn(6, 24, generator=generator)
    (actual,) = torch.autograd.grad(FrozenMatmul.apply(x, weight, scale), x, grad)
    (expected,) = torch.autograd.grad(F.linear(x, dequantise(weight, scale, torch.float32)), x, grad)
    torch.testing.assert_close(actual, expected)


def test_experts_of_another_rank_are_skipped_with_and_without_gradient(generator):
    """Expert parallelism marks them with the number of this rank's experts and a gate of zero."""
    plain = nn.Module()
    plain.down_proj = torch.empty(3, 16, 32, device="meta")
    experts = QuantizedExperts(plain, bits=8, gate_up_blocks=1, down_blocks=2)
    for name in ("gate_up_proj", "down_proj"):
        parameter = getattr(experts, name)
        weight, scale = random_int8(generator, *parameter.shape, blocks=getattr(experts, f"{name}_scale").shape[-1])
        parameter.copy_(weight)
        getattr(experts, f"{name}_scale").copy_(scale)
    x = torch.randn(4, 16, generator=generator)
    chosen = torch.tensor([[0, 2], [3, 1], [3, 3], [2, 3]])
    gates = torch.rand(4, 2, generator=generator).masked_fill(chosen == 3, 0.0)
    expected = torch.zeros(4, 16, dtype=torch.double)
    for token in range(4):
        for slot in range(2):
            if (e := chosen[token, slot]) < 3:
                gate, up = exact(x[token], experts.gate_up_proj[e], experts.gate_up_proj_scale[e]).chunk(2)
                y = exact(F.gelu(gate, approximate="tanh") * up, experts.down_proj[e], experts.down_proj_scale[e])
                expected[token] += gates[token, slot].double() * y
    assert error(experts(x, chosen, gates), expected) < 1e-6
    assert error(experts(x.requires_grad_(), chosen, gates).detach(), expected) < 1e-6
    assert (experts(x, chosen, gates)[2] == 0).all()


@pytest.mark.parametrize("blocks", [1, 8])
def test_quantise_clips_nothing_and_errs_by_half_a_step(generator, blocks):
    weight = torch.randn(300, 64, generator=generator)
    weight[7] = 0
    values, scale = quantise_int8(weight, blocks)
    steps = scale.double().repeat_interleave(64 // blocks, dim=-1)
    assert values.abs().max() == 127
    assert ((values * steps - weight).abs() <= 0.501 * steps).all()
    assert (values[7] == 0).all()
    assert (scale[7] == 0).all()


def test_quantise_gives_back_what_was_dequantised(generator):
    """Exactly from float32; from bfloat16 but for scales with the significand 1.5, which come back one bit smaller."""
    values = torch.randint(-127, 128, (256, 64), generator=generator, dtype=torch.int8)
    values[:, 0] = 127
    scale = (1 + torch.arange(256) % 128 / 128).bfloat16()[:, None] * 2**-9
    for dtype in (torch.float32, torch.bfloat16):
        again, again_scale = quantise_int8(dequantise(values, scale, dtype), 1)
        same = torch.ones(256, dtype=torch.bool) if dtype == torch.float32 else (scale != 1.5 * 2**-9).squeeze(1)
        assert torch.equal(again[same], values[same])
        assert torch.equal(again_scale[same], scale[same])
        assert (again.int() - values.int()).abs().max() <= 1
