"""The products of one token, which torch.compile turns into a read of the chosen weights, are the plain ones."""

import copy

import pytest
import torch

from modeling_grok1 import modeling_grok1 as model_file
from modeling_grok1.decoding_grok1 import reduced_matmul
from modeling_grok1.modeling_grok1 import Grok1Experts


# Inputs of a row: whole, in pieces, a prime number of them.
@pytest.mark.parametrize("inputs", [16, 1024, 1368, 4099])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_multiplied_with_the_matrix_of_their_expert(inputs, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 24, inputs, generator=generator).to(dtype)
    x = torch.randn(3, inputs, generator=generator).to(dtype)
    experts = torch.tensor([2, 0, 2])
    y = reduced_matmul(x, weight, experts)
    assert y.dtype == dtype
    expected = torch.einsum("sk,snk->sn", x.double(), weight[experts].double())
    magnitude = torch.einsum("sk,snk->sn", x.double().abs(), weight[experts].double().abs())
    assert ((y - expected).abs() <= torch.finfo(dtype).eps * magnitude).all()


@pytest.fixture
def experts(small_config):
    torch.manual_seed(0)
    small_config._experts_implementation = "grouped_mm"
    module = Grok1Experts(small_config)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_compiled_step_gives_the_plain_result_without_the_grouped_product(experts, dtype, monkeypatch):
    def grouped(*args):
        raise AssertionError("the grouped product was called")

    monkeypatch.setattr(model_file, "grouped_mm_experts_forward", grouped)
    experts = experts.to(dtype)
    compiled = torch.compile(experts, fullgraph=True, dynamic=False)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, experts.gate_up_proj.shape[-1], generator=generator).to(dtype)
        chosen = torch.randperm(experts.num_experts, generator=generator)[None, :2]
        gates = torch.rand(1, 2, generator=generator).to(dtype)
        expected = copy.deepcopy(experts).double().plain_forward(x.double(), chosen, gates.double())
        actual = compiled(x, chosen, gates)
        assert (actual - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@torch.no_grad()
def test_an_expert_of_another_rank_adds_nothing(experts):
    """Expert parallelism gives it the number after the last expert, and the gate 0."""
    E = experts.num_experts  # noqa: N806
    x = torch.randn(1, experts.gate_up_proj.shape[-1])
    gates = torch.tensor([[0.75, 0.0]])
    compiled = torch.compile(experts, fullgraph=True, dynamic=False)
    expected = experts.plain_forward(x, torch.tensor([[1, E]]), gates)
    torch.testing.assert_close(compiled(x, torch.tensor([[1, E]]), gates), expected)


@torch.no_grad()
def test_float64_is_computed_although_the_grouped_product_lacks_it(experts):
    experts = experts.double()
    x = torch.randn(5, experts.gate_up_proj.shape[-1], dtype=torch.float64)
    chosen, gates = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3]]), torch.rand(5, 2, dtype=torch.float64)
    assert torch.equal(experts(x, chosen, gates), experts.plain_forward(x, chosen, gates))
