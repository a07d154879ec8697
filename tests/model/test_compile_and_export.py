"""The model as one graph: torch.compile with fullgraph and a static cache, torch.export, and no recompilation."""

import pytest
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.executorch import register_dynamic_cache_export_support

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
    """The golden logits, from a program that was traced at another shape."""
    traced = (inputs[:2, :20].contiguous() for inputs in (expected.tokens, expected.attention_mask))
    exported = export(model, *traced)
    for rows, columns in ((2, 20), (3, 27)):  # the traced shape and another
        tokens, mask = expected.tokens[:rows, :columns], expected.attention_mask[:rows, :columns]
        logits = exported(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        assert (logits - expected.logits[:rows, :columns]).abs().max() <= 1e-4


def export(model, tokens, attention_mask=None, cache=None):
    """The program of batches of 1 to 64, with up to 400 tokens, after as many in the cache where there is one."""
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=1, max=400)
    inputs = {"input_ids": tokens, "use_cache": cache is not None}
    shapes = {"input_ids": {0: batch, 1: length}, "use_cache": None}
    if cache is not None:
        register_dynamic_cache_export_support()
        past = [{0: batch, 2: Dim("past", min=1, max=400)}] * len(cache.layers)
        inputs["past_key_values"], shapes["past_key_values"] = cache, [past, past]
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        # torch's least size of a free dimension in a trace is 2, so that of past and new tokens together is 4.
        total = Dim("total", min=4, max=800) if cache is not None else length
        shapes["attention_mask"] = {0: batch, 1: total}
    return torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes, strict=False).module()


def filled(model, tokens, mask):
    cache = DynamicCache(config=model.config)
    model(tokens, attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize(
    ("cached", "masked", "traced"),  # 300: eager attention computes its scores in pieces
    [(False, True, 30), (False, False, 300), (True, False, 30), (True, True, 300)],
)
def test_an_exported_program_takes_every_batch_and_length(small_config, masked, cached, traced):
    torch.manual_seed(0)
    small_config.initializer_range, small_config.max_position_embeddings = 0.2, 512
    model = Grok1ForCausalLM(small_config).eval()

    def batch(rows, past, new):
        tokens = torch.randint(3, 96, (rows, past + new))
        mask = torch.ones_like(tokens)
        mask[0, : (past + new) // 3] = 0  # on the left
        before, mask = (mask[:, :past], mask) if masked else (None, None)
        caches = [filled(model, tokens[:, :past], before) if past else None for _ in range(2)]
        return tokens[:, past:].contiguous(), mask, caches

    tokens, mask, caches = batch(2, 10 if cached else 0, traced)
    exported = export(model, tokens, mask, caches[0])
    lengths = [(3, 1), (2, 2), (17, 5), (100, 300), (399, 1)] if cached else [(0, n) for n in (2, 3, 97, 218, 400)]
    for rows in (1, 3):
        for past, new in lengths:
            tokens, mask, caches = batch(rows, past, new)
            options = {"input_ids": tokens, "use_cache": cached} | ({"attention_mask": mask} if masked else {})
            passed = [{**options, "past_key_values": cache} if cached else options for cache in caches]
            actual, expected = exported(**passed[0]).logits, model(**passed[1]).logits
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=f"{rows} {past} {new}")


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"experts_layout": "linear"}, "load without `experts_layout`"),
        ({"experts_implementation": "eager"}, r"model.set_experts_implementation\('grok1'\)"),
    ],
    ids=["linear", "eager"],
)
def test_experts_that_cannot_be_exported_are_refused_by_name(small_config, options, advice):
    implementation = options.pop("experts_implementation", None)
    model = Grok1ForCausalLM(small_config, **options).eval()
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with pytest.raises(ValueError, match=rf"^torch\.export cannot trace .*{advice}"):
        torch.export.export(model, (), kwargs={"input_ids": torch.tensor([[3, 4, 5]])}, strict=False)


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
