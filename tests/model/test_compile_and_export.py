"""The model as one graph: torch.compile with fullgraph and a static cache, torch.export, and no recompilation."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from modeling_grok1 import Grok1ForCausalLM


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(reference):
    return reference("tiny-1", "fp32")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fullgraph_decoding_with_a_static_cache(model, expected, backend):
    """One graph for the prompt, one for every further token; the golden tokens come out."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    step = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=counted)
    cache = StaticCache(model.config, max_cache_len=40)
    logits = step(expected.prompt, past_key_values=cache).logits[:, -1]
    tokens, prefill = [], len(graphs)
    for position in range(12, 32):
        tokens.append(logits.argmax(-1))
        assert (logits[0] - expected.greedy_logits[len(tokens) - 1]).abs().max() <= 1e-4
        position_ids = torch.tensor([[position]])
        logits = step(tokens[-1][:, None], past_key_values=cache, position_ids=position_ids).logits[:, -1]
    assert torch.cat(tokens).tolist() == expected.greedy.tolist()
    assert prefill == 1
    assert len(graphs) == 2


@torch.no_grad()
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_fullgraph_with_padding(converted, expected, experts):
    model = AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), experts_implementation=experts)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(expected.tokens, attention_mask=expected.attention_mask, use_cache=False).logits
    assert (logits - expected.logits).abs().max() <= 1e-4


def test_fullgraph_trains(small_config):
    torch.manual_seed(0)
    model = Grok1ForCausalLM(small_config).train()
    tokens = torch.randint(3, 96, (2, 12))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_export(model, expected):
    batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    inputs = {"input_ids": expected.tokens[:2, :20], "attention_mask": expected.attention_mask[:2, :20]}
    program = torch.export.export(
        model,
        (),
        kwargs={**inputs, "use_cache": False},
        dynamic_shapes={
            "input_ids": {0: batch, 1: length},
            "attention_mask": {0: batch, 1: length},
            "use_cache": None,
        },
        strict=False,
    )
    exported = program.module()
    for rows, columns in ((2, 20), (3, 27)):  # the traced shape and another
        tokens, mask = expected.tokens[:rows, :columns], expected.attention_mask[:rows, :columns]
        logits = exported(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        assert (logits - expected.logits[:rows, :columns]).abs().max() <= 1e-4


def test_linear_experts_are_refused_by_name_in_one_full_graph(small_config):
    fused, linear = (
        Grok1ForCausalLM(small_config).eval(),
        Grok1ForCausalLM(small_config, experts_layout="linear").eval(),
    )
    assert fused._can_compile_fullgraph
    assert not linear._can_compile_fullgraph  # `generate` does not try
    tokens = torch.tensor([[3, 4, 5]])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"use `experts_layout='fused'` for a full graph"):
        torch.compile(linear, fullgraph=True, backend="eager")(tokens, use_cache=False)
    in_pieces = torch.compile(linear, backend="eager")(tokens, use_cache=False).logits
    assert torch.equal(in_pieces, linear(tokens, use_cache=False).logits)
