"""Packed integers, scales and config.json are those that the compressed-tensors library defines."""

import pytest
import torch
from packed_folders import pack_plainly

from modeling_grok1.packing_grok1 import (
    bits_and_group_size,
    merge_scales,
    pack,
    quantise_int4,
    quantization_dict,
    repeat_scales,
    unpack,
)


def random_values(bits, *shape):
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", [8, 4])
def test_packing_is_shifts_and_sums_and_can_be_reversed(bits):
    values = random_values(bits, 37, 96)
    packed = pack(values, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (37, 96 * bits // 32)
    assert torch.equal(packed, pack_plainly(values, bits))
    assert torch.equal(unpack(packed, bits), values)
    assert torch.equal(unpack(pack(values[:, ::3].contiguous()[:, :32], bits), bits), values[:, ::3][:, :32])
    experts = random_values(bits, 3, 5, 32)
    assert torch.equal(pack(experts, bits), torch.stack([pack(expert, bits) for expert in experts]))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_librarys_own_packing_and_decompression(bits):
    pytest.importorskip("compressed_tensors", reason="needs pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    values = random_values(bits, 40, 256)
    assert torch.equal(pack(values, bits), pack_to_int32(values, bits))
    assert torch.equal(unpack_from_int32(pack(values, bits), bits, values.shape), values)

    scheme = QuantizationConfig.model_validate(quantization_dict(bits, 64)).config_groups["group_0"]
    scale = (torch.rand(40, 4) * 0.01 + 0.001).bfloat16()
    tensors = {"weight_packed": pack(values, bits), "weight_scale": scale, "weight_shape": torch.tensor([40, 256])}
    weight = BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, scheme)["weight"]
    assert torch.equal(weight, values.bfloat16() * scale.repeat_interleave(64, dim=1))


def test_scales_are_repeated_for_groups_and_merged_to_the_fewest_blocks():
    scale = torch.rand(2, 7, 3).bfloat16()
    assert torch.equal(merge_scales(repeat_scales(scale, 12)), scale)
    assert torch.equal(merge_scales(scale), scale)
    assert merge_scales(torch.ones(7, 12)).shape == (7, 1)
    almost = torch.ones(7, 12)
    almost[3, 8] = 2
    assert torch.equal(repeat_scales(merge_scales(almost), 12), almost)
    assert merge_scales(almost).shape == (7, 12)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("distribution", [torch.randn, torch.rand])
def test_the_search_for_scales_never_loses_to_rounding_to_nearest(distribution, group_size):
    torch.manual_seed(0)
    weight = distribution(64, 512) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    errors = {}
    for search in (True, False):
        values, scale = quantise_int4(weight, group_size, scale_search=search)
        assert values.dtype == torch.int8
        assert scale.shape == (64, 512 // group_size)
        assert values.min() >= -8
        assert values.max() <= 7
        steps = scale.double().repeat_interleave(group_size, dim=1)
        errors[search] = (values * steps - weight).square().unflatten(1, (-1, group_size)).sum(dim=-1)
        assert (errors[search][5] == 0).all()
    assert errors[True].sum() < 0.95 * errors[False].sum()
    assert (errors[True] <= errors[False] * 1.03 + 1e-30).all()


def test_weights_that_are_multiples_of_a_scale_come_back_exactly():
    values = random_values(4, 32, 256)
    values[:, ::32] = -8
    scale = 2.0 ** torch.randint(-12, 3, (32, 8)).float()
    weight = values * scale.repeat_interleave(32, dim=1)
    found, steps = quantise_int4(weight, 32)
    assert torch.equal(found * steps.float().repeat_interleave(32, dim=1), weight)


def test_config_of_other_schemes_is_left_to_the_library():
    assert bits_and_group_size(quantization_dict(8, 128)) == (8, 128)
    assert bits_and_group_size(quantization_dict(4, 32)) == (4, 32)

    def changed(**weights):
        config = quantization_dict(4, 32)
        config["config_groups"]["group_0"]["weights"].update(weights)
        return bits_and_group_size(config)

    assert changed(symmetric=False) is None
    assert changed(num_bits=3) is None
    assert changed(strategy="channel", group_size=None) is None
    assert changed(actorder="group") is None
    assert bits_and_group_size(quantization_dict(4, 32) | {"format": "nvfp4-pack-quantized"}) is None
    assert bits_and_group_size({"quant_method": "bitsandbytes"}) is None
