"""The released model, 314B parameters, built on the meta device: every name, shape and dtype."""

import pytest
import torch

from grok1.conversion.names import hub_tensors
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


PARAMETERS = 315_684_820_992
HEAD = 131072 * 6144
E, D, F = 8, 6144, 32768


def build(**options) -> Grok1ForCausalLM:
    with torch.device("meta"):
        return Grok1ForCausalLM._from_config(GrokConfig(), dtype=torch.bfloat16, **options)


@pytest.fixture(scope="module")
def fused():
    return build()


@pytest.fixture(scope="module")
def linear():
    return build(experts_layout="linear")


def in_memory(layout: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """What the converter's table says a model of that layout holds."""
    table = hub_tensors(GrokConfig(), layout, "bfloat16")
    return {name: (tensor.shape, f"torch.{tensor.dtype}") for name, tensor in table.items()}


@pytest.mark.parametrize(("layout", "on_disk"), [("fused", "fused"), ("linear", "hub")])
def test_every_name_shape_and_dtype_is_the_tables(request, layout, on_disk):
    model = request.getfixturevalue(layout)
    found = {name: (tuple(p.shape), str(p.dtype)) for name, p in model.state_dict().items()}
    assert found == in_memory(on_disk)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_the_number_of_parameters(request, layout):
    model = request.getfixturevalue(layout)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert model.num_parameters() == PARAMETERS
    assert sum(t.numel() for t in model.state_dict().values()) == PARAMETERS + HEAD == 316_490_127_360


def test_the_layers_hold_what_the_release_says(fused, linear):
    layer = fused.model.layers[63]
    assert layer.block_sparse_moe.experts.gate_up_proj.shape == (E, 2 * F, D)
    assert layer.block_sparse_moe.experts.down_proj.shape == (E, D, F)
    assert layer.self_attn.q_proj.weight.shape == (48 * 128, D)
    assert layer.self_attn.k_proj.weight.shape == layer.self_attn.v_proj.weight.shape == (8 * 128, D)
    expert = linear.model.layers[63].block_sparse_moe.experts[7]
    assert (expert.w1.weight.shape, expert.w3.weight.shape, expert.w2.weight.shape) == ((F, D), (F, D), (D, F))
    assert len(fused.model.layers) == len(linear.model.layers) == 64


def test_only_norms_and_routers_are_float32(fused, linear):
    for model in (fused, linear):
        kept = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
        assert len(kept) == 64 * 5 + 1
        assert all(name.endswith(("norm.weight", "block_sparse_moe.gate.weight")) for name in kept)
        dtypes = {p.dtype for name, p in model.named_parameters() if name not in kept}
        assert dtypes == {torch.bfloat16}


def test_a_token_uses_the_published_number_of_parameters(fused):
    """Two of eight experts; the embedding is read, and multiplied as the head."""
    experts = sum(p.numel() for name, p in fused.named_parameters() if ".experts." in name)
    assert experts == 64 * 8 * 3 * D * F == 309_237_645_312
    assert PARAMETERS - experts * 6 // 8 == 83_756_587_008
