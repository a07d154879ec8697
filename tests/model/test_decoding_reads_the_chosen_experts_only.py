"""The fast products of one token, compiled and not, are the plain ones and read the chosen weights only."""

import copy
import threading

import pytest
import torch
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from modeling_grok1 import Grok1ForCausalLM, cpu_grok1
from modeling_grok1.cpu_grok1 import ONEDNN, Level, fast_decoding, matmul_by_reduction, matmul_of_few_rows
from modeling_grok1.experts_grok1 import DEFAULT_EXPERTS
from modeling_grok1.modeling_grok1 import Grok1Experts


# Inputs of a row: whole, in pieces, a prime number of them. Outputs: in four quarters, and a number that has none.
@pytest.mark.parametrize("inputs", [16, 1024, 1368, 4099, 8192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [20, 22])
def test_rows_are_multiplied_with_the_matrix_of_their_expert(outputs, inputs, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, outputs, inputs, generator=generator).to(dtype)
    x = torch.randn(3, inputs, generator=generator).to(dtype)
    experts = torch.tensor([2, 0, 2])
    y = matmul_by_reduction(x, weight, experts)
    assert y.dtype == dtype
    expected = torch.einsum("sk,snk->sn", x.double(), weight[experts].double())
    magnitude = torch.einsum("sk,snk->sn", x.double().abs(), weight[experts].double().abs())
    assert (y - expected).norm() <= torch.finfo(dtype).eps / 2 * magnitude.norm()


@pytest.fixture
def experts(small_config):
    torch.manual_seed(0)
    small_config._experts_implementation = DEFAULT_EXPERTS
    module = Grok1Experts(small_config)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@torch.no_grad()
def test_a_step_gives_the_result_of_all_experts_without_the_grouped_product(experts, compiled, dtype, monkeypatch):
    def grouped(*args):
        raise AssertionError("the grouped product was called")

    monkeypatch.setitem(ExpertsInterface._global_mapping, "grouped_mm", grouped)
    experts = experts.to(dtype)
    step = torch.compile(experts, fullgraph=True, dynamic=False) if compiled else experts
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, experts.gate_up_proj.shape[-1], generator=generator).to(dtype)
        chosen = torch.randperm(experts.num_experts, generator=generator)[None, :2]
        gates = torch.rand(1, 2, generator=generator).to(dtype)
        expected = copy.deepcopy(experts).double().eager_forward(x.double(), chosen, gates.double())
        actual = step(x, chosen, gates)
        assert (actual - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


@torch.no_grad()
def test_an_expert_of_another_rank_adds_nothing(experts):
    """Expert parallelism gives it the number after the last expert, and the gate 0."""
    E = experts.num_experts  # noqa: N806
    x = torch.randn(1, experts.gate_up_proj.shape[-1])
    gates = torch.tensor([[0.75, 0.0]])
    expected = experts.eager_forward(x, torch.tensor([[1, E]]), gates)
    for step in (experts, torch.compile(experts, fullgraph=True, dynamic=False)):
        torch.testing.assert_close(step(x, torch.tensor([[1, E]]), gates), expected)


@torch.no_grad()
def test_float64_is_computed_although_the_grouped_product_lacks_it(experts):
    experts = experts.double()
    x = torch.randn(5, experts.gate_up_proj.shape[-1], dtype=torch.float64)
    chosen, gates = torch.tensor([[0, 1], [1, 2], [3, 0], [2, 1], [0, 3]]), torch.rand(5, 2, dtype=torch.float64)
    assert torch.equal(experts(x, chosen, gates), experts.eager_forward(x, chosen, gates))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [21, 6000], ids=["short", "long"])
@pytest.mark.parametrize("compiling", [False, True])
def test_products_of_attention_are_those_of_matmul(compiling, length, dtype, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 4, 16, generator=generator).to(dtype)
    key = torch.randn(2, 3, length, 16, generator=generator).to(dtype)
    for x, y in ((query, key.transpose(2, 3)), (query @ key.transpose(2, 3), key)):
        actual, expected = matmul_of_few_rows(x, y), x.double() @ y.double()
        bound = torch.finfo(dtype).eps * x.shape[-1] * (x.double().abs() @ y.double().abs())  # of any order of the sum
        assert actual.dtype == dtype
        assert ((actual - expected).abs() <= bound).all()


def products(module, x):
    """The result of a compiled module within `fast_decoding`, and whether it called the product of torch."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with fast_decoding():
        result = torch.compile(module, backend=backend)(x)
    return result, any(node.target is F.linear for graph in graphs for node in graph.graph.nodes)


@torch.no_grad()
def test_only_a_projection_of_one_token_is_reduced():
    torch.manual_seed(0)
    plain = torch.nn.Linear(32, 48, bias=False)
    row, rows = torch.randn(1, 1, 32), torch.randn(1, 2, 32)
    result, called = products(plain, row)
    torch.testing.assert_close(result, plain(row))
    assert not called
    assert products(plain, rows)[1]
    with torch.enable_grad():
        assert products(plain, row)[1]
    hooked = copy.deepcopy(plain)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(products(hooked, row)[0], 2 * plain(row))
    replaced = copy.deepcopy(plain)
    replaced.forward = lambda x: plain(x) + 1  # as Accelerate does
    torch.testing.assert_close(products(replaced, row)[0], plain(row) + 1)
    biased = torch.nn.Linear(32, 48)
    torch.testing.assert_close(products(biased, row)[0], biased(row))


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    return Grok1ForCausalLM(small_config).eval()


@torch.no_grad()
def test_hooks_of_all_modules_see_every_step(model):
    """Global hooks too: the model calls its modules plainly."""
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
    projection = model.model.layers[0].self_attn.q_proj
    assert sum(module is projection for module in called) == 3


@torch.no_grad()
def test_fast_decoding_gives_the_tokens_of_plain_decoding(model):
    """A hand-written loop, with and without, in float64: the products differ in the order of their sums only."""
    model = model.double()

    def decode(ids, steps=6):
        cache, logits = None, []
        for _ in range(steps):
            output = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(dim=-1, keepdim=True)], dim=1)
        return ids, torch.stack(logits)

    prompt = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(0))
    plain, logits = decode(prompt)
    with fast_decoding(model):
        fast, fast_logits = decode(prompt)
    assert torch.equal(fast, plain)
    torch.testing.assert_close(fast_logits, logits, rtol=0, atol=1e-6)  # scores of attention are float32


@pytest.fixture
def without_kernels(monkeypatch):
    """A machine without a C compiler: a step then takes torch's own product of one row."""
    monkeypatch.setattr(cpu_grok1, "level", lambda: Level(bfloat16=True, kernels=False))


@pytest.mark.parametrize(
    ("dtype", "batch", "off"), [("bfloat16", 1, True), ("bfloat16", 2, False), ("float32", 1, False)]
)
def test_onednn_is_switched_once_in_a_loop(without_kernels, model, dtype, batch, off, monkeypatch):
    model = model.to(getattr(torch, dtype))
    turns = []

    leave, enter = ONEDNN.leave, ONEDNN.enter
    monkeypatch.setattr(ONEDNN, "leave", lambda: turns.append("off") or leave())
    monkeypatch.setattr(ONEDNN, "enter", lambda: turns.append("on") or enter())
    with fast_decoding(model), torch.no_grad():
        for _ in range(3):
            model(torch.full((batch, 1), 5))
    assert turns == (["off", "on"] if off else [])
    assert torch.backends.mkldnn.enabled


def test_onednn_is_put_back_after_an_exception(without_kernels, monkeypatch):
    weight, row = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(1, 1, 8, dtype=torch.bfloat16)
    for before in (False, True):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", before)
        with pytest.raises(KeyError), torch.no_grad(), fast_decoding():
            F.linear(row, weight)
            assert not torch.backends.mkldnn.enabled
            raise KeyError
        assert torch.backends.mkldnn.enabled is before


def test_threads_that_overlap_leave_onednn_as_it_was(without_kernels):
    entered, leave = threading.Event(), threading.Event()
    weight, row = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(1, 1, 8, dtype=torch.bfloat16)

    def other():
        with torch.no_grad(), fast_decoding():
            F.linear(row, weight)
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with torch.no_grad(), fast_decoding():
        F.linear(row, weight)
        thread.start()
        assert entered.wait(10)
    assert not torch.backends.mkldnn.enabled  # the other is inside
    leave.set()
    thread.join()
    assert torch.backends.mkldnn.enabled
