"""Every product with weights of 4 bits gives what dequantising and multiplying in float64 gives, in both orders."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modeling_grok1 import quantized_grok1
from modeling_grok1.int4_grok1 import as_in_files, cpu_block_size, for_cpu, from_cpu, is_for_cpu, order_for_cpu
from modeling_grok1.packing_grok1 import pack
from modeling_grok1.quantized_grok1 import (
    FrozenMatmul,
    QuantizedExperts,
    dequantise,
    form_for_device,
    grouped_matmul,
    plain_matmul,
    quantised_matmul,
)


SHAPES = [(128, 256, 32), (192, 128, 128), (1088, 64, 64)]  # outputs, inputs, group size


def random_int4(*shape, group_size):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(*shape[:-1], shape[-1] // group_size, generator=generator) * 0.01 + 0.001
    return values, scale.bfloat16()


def exact(x, values, scale):
    group_size = values.shape[-1] // scale.shape[-1]
    return x.double() @ (values.double() * scale.double().repeat_interleave(group_size, dim=-1)).mT


def error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("block_size", [64, 32])
def test_the_order_for_cpus_can_be_reversed(block_size):
    values, _ = random_int4(3, 192, 64, group_size=32)
    assert torch.equal(from_cpu(for_cpu(pack(values, 4), block_size)), values)


def test_the_order_for_cpus_is_torchs_own():
    values, _ = random_int4(256, 96, group_size=32)
    if cpu_block_size() is None:
        pytest.skip("torch orders weights differently on this processor")
    expected = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int() + 8, 1)
    assert torch.equal(for_cpu(pack(values, 4), cpu_block_size()).flatten(), expected.flatten())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_both_orders_hold_the_same_weights(shape, ordered):
    outputs, inputs, group_size = shape
    values, scale = random_int4(2, outputs, inputs, group_size=group_size)
    weight, scales = pack(values, 4), scale
    if ordered:
        weight, scales = order_for_cpu(weight, scale)
        assert is_for_cpu(weight) == (cpu_block_size() is not None)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        product = values.double() * scale.double().repeat_interleave(group_size, dim=-1)
        assert torch.equal(dequantise(weight, scales, dtype), product.to(dtype))
    again, again_scale = as_in_files(weight, scales)
    assert torch.equal(again, pack(values, 4))
    assert torch.equal(again_scale, scale)


@pytest.mark.parametrize("rows", [1, 3, 32, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", [1, 2**20])
def test_products(monkeypatch, rows, shape, dtype, part):
    monkeypatch.setattr(quantized_grok1, "DEQUANTISED_ELEMENTS", part)
    outputs, inputs, group_size = shape
    values, scale = random_int4(outputs, inputs, group_size=group_size)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = exact(x, values, scale)
    bound = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    for weight, scales in ((pack(values, 4), scale), form_for_device(pack(values, 4), scale)):
        for product in (plain_matmul, quantised_matmul):
            y = product(x, weight, scales)
            assert y.dtype == dtype
            assert error(y, expected) < bound


def test_what_torchs_product_has_no_order_for_stays_packed():
    for outputs, group_size in ((40, 32), (64, 16)):
        values, scale = random_int4(outputs, 64, group_size=group_size)
        weight, scales = form_for_device(pack(values, 4), scale)
        assert weight.dtype == torch.int32
        x = torch.randn(1, 64)
        assert error(quantised_matmul(x, weight, scales), exact(x, values, scale)) < 1e-6


def test_the_gradient_is_that_of_the_dequantised_matrix():
    values, scale = random_int4(128, 64, group_size=32)
    x, grad = torch.randn(5, 64, requires_grad=True), torch.randn(5, 128)
    for weight, scales in ((pack(values, 4), scale), form_for_device(pack(values, 4), scale)):
        (actual,) = torch.autograd.grad(FrozenMatmul.apply(x, weight, scales), x, grad)
        floats = dequantise(pack(values, 4), scale, torch.float32)
        (expected,) = torch.autograd.grad(F.linear(x, floats), x, grad)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("ordered", [False, True])
def test_grouped_products_and_experts_of_another_rank(ordered):
    plain = nn.Module()
    plain.down_proj = torch.empty(3, 64, 128, device="meta")
    experts = QuantizedExperts(plain, bits=4, gate_up_blocks=2, down_blocks=4)
    floats = {}
    for name, shape in {"gate_up_proj": (3, 256, 64), "down_proj": (3, 64, 128)}.items():
        values, scale = random_int4(*shape, group_size=32)
        floats[name] = values.double() * scale.double().repeat_interleave(32, dim=-1)
        weight, scales = form_for_device(pack(values, 4), scale) if ordered else (pack(values, 4), scale)
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))
        setattr(experts, f"{name}_scale", nn.Parameter(scales, requires_grad=False))
    x, chosen = torch.randn(4, 64), torch.tensor([[0, 2], [3, 1], [3, 3], [2, 3]])
    gates = torch.rand(4, 2).masked_fill(chosen == 3, 0.0)
    expected = torch.zeros(4, 64, dtype=torch.double)
    for token, slot in ((t, s) for t in range(4) for s in range(2) if chosen[t, s] < 3):
        e = chosen[token, slot]
        gate, up = (x[token].double() @ floats["gate_up_proj"][e].T).chunk(2)
        y = (F.gelu(gate, approximate="tanh") * up) @ floats["down_proj"][e].T
        expected[token] += gates[token, slot].double() * y
    assert error(experts(x, chosen, gates), expected) < 1e-6
    assert error(experts(x.requires_grad_(), chosen, gates).detach(), expected) < 1e-6
    offsets = torch.tensor([1, 1, 4], dtype=torch.int32)
    y = grouped_matmul(x.detach(), experts.gate_up_proj, experts.gate_up_proj_scale, offsets)
    assert error(y[1:], x[1:].detach().double() @ floats["gate_up_proj"][2].T) < 1e-6
