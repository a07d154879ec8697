"""Every `cache_implementation` of Transformers gives the greedy tokens, keeps to a stated bound, or is refused with a
sentence; and what was computed once is gone on from."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS


EXACT = ("dynamic", "static", "hybrid", "sliding_window", "hybrid_chunked")  # the last three are old names of "static"
OFFLOADED = ("offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked")
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)


@pytest.fixture(scope="module")
def xai(reference):
    return reference("tiny-1", "fp32")


def generated(model, tokens: torch.Tensor, new: int = 20, **options: Any) -> Any:
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)


def test_no_name_is_left_out():
    assert set(ALL_CACHE_IMPLEMENTATIONS) == {*EXACT, *OFFLOADED, "quantized"}


@pytest.mark.parametrize("name", EXACT)
def test_plain_caches_give_the_golden_tokens(model, xai, name):
    output = generated(model, xai.prompt, cache_implementation=name, disable_compile=True)
    assert output[0, 12:].tolist() == xai.greedy.tolist()


@pytest.mark.parametrize("name", OFFLOADED)
def test_caches_in_host_memory_need_a_gpu(model, xai, name):
    if torch.cuda.is_available():
        model = copy.deepcopy(model).cuda()
        output = generated(model, xai.prompt.cuda(), cache_implementation=name, disable_compile=True)
        assert output[0, 12:].tolist() == xai.greedy.tolist()
    else:
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            generated(model, xai.prompt, cache_implementation=name)


def test_paged_is_continuous_batching(model, xai):
    config = ContinuousBatchingConfig(page_size=8, num_blocks=8, max_batch_tokens=32, use_cuda_graph=False)
    output = generated(model, xai.prompt, cache_implementation="paged", continuous_batching_config=config)
    assert output.flatten().tolist()[-20:] == xai.greedy.tolist()


def test_an_unknown_name_is_refused_with_the_known_ones(model, xai):
    with pytest.raises(ValueError, match=r"Invalid `cache_implementation` \(nonsense\).*'static'.*'quantized'"):
        generated(model, xai.prompt, cache_implementation="nonsense")


def test_a_name_and_a_cache_are_refused_together(model, xai):
    with pytest.raises(ValueError, match=r"both `cache_implementation`.*and `(cache|past_key_values)`"):
        generated(model, xai.prompt, cache_implementation="static", past_key_values=DynamicCache())


def test_a_static_cache_is_compiled_as_generate_does_it(model, xai):
    """One graph for all tokens after the first, by `generate`'s own switch, which off a GPU has to be forced."""
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, mode=None, backend=counted)
    compile_config._compile_all_devices = True
    output = generated(model, xai.prompt, cache_implementation="static", compile_config=compile_config)
    assert output[0, 12:].tolist() == xai.greedy.tolist()
    assert len(graphs) == 1
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------------------------
# Quantised
# --------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def teacher_forced(model, tokens: torch.Tensor, cache, prefill: int = 12) -> torch.Tensor:
    """The logits after the prompt and after each token of the rest, read one by one through the cache."""
    logits = [model(tokens[:, :prefill], past_key_values=cache).logits[:, -1]]
    for i in range(prefill, tokens.shape[1]):
        logits.append(model(tokens[:, i : i + 1], past_key_values=cache).logits[:, -1])
    return torch.cat(logits)


class RoundedLayer(DynamicLayer):
    """Keys and values rounded to float8 (e4m3) with the scale of the prompt, which itself is attended to unrounded."""

    def update(self, key_states, value_states, *args, **kwargs):
        first = not self.is_initialized
        if first:
            self.scales = [states.abs().max() / 448 for states in (key_states, value_states)]
        rounded = [
            (states / scale).to(torch.float8_e4m3fn).float() * scale
            for states, scale in zip((key_states, value_states), self.scales, strict=True)
        ]
        kept = super().update(*rounded, *args, **kwargs)
        return (key_states, value_states) if first else kept


def test_the_float8_cache_is_what_rounding_the_keys_and_values_gives(model, xai):
    tokens = torch.cat((xai.prompt, xai.greedy[None]), dim=1)
    reference = DynamicCache()
    reference.layers = [RoundedLayer() for _ in range(model.config.num_hidden_layers)]
    expected = teacher_forced(model, tokens, reference)
    actual = teacher_forced(model, tokens, QuantizedCache("fp8", model.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    exact = teacher_forced(model, tokens, DynamicCache())
    assert torch.equal(actual[0], exact[0])  # the prompt
    assert 1e-3 < (actual - exact).norm() / exact.norm() < 0.3

    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    output = generated(model, xai.prompt, return_dict_in_generate=True, output_logits=True, **options)
    assert isinstance(output.past_key_values, QuantizedCache)
    again = DynamicCache()
    again.layers = [RoundedLayer() for _ in range(model.config.num_hidden_layers)]
    expected = teacher_forced(model, output.sequences[:, :-1], again)
    torch.testing.assert_close(torch.cat(output.logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_2_and_4_bit_caches_approach_the_exact_one(model, xai, backend):
    pytest.importorskip(BACKENDS[backend])
    tokens = torch.cat((xai.prompt, xai.greedy[None]), dim=1)
    exact = teacher_forced(model, tokens, DynamicCache())
    errors = {}
    for bits in (2, 4):
        axis = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
        cache = QuantizedCache(backend, model.config, nbits=bits, q_group_size=16, residual_length=4, **axis)
        actual = teacher_forced(model, tokens, cache)
        assert torch.equal(actual[0], exact[0])  # the prompt
        errors[bits] = ((actual - exact).norm() / exact.norm()).item()
    assert errors[4] < 0.5 * errors[2] < 1, errors


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum-quanto"), ("hqq", "hqq")])
def test_a_backend_that_is_not_installed_is_named(model, xai, backend, package):
    if importlib.util.find_spec(BACKENDS[backend].split(".")[0]):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"pip install {package}"):
        generated(model, xai.prompt, cache_implementation="quantized", cache_config={"backend": backend})


def test_an_unknown_backend_is_refused(model, xai):
    with pytest.raises(ValueError, match="Unknown quantization backend `nonsense`"):
        generated(model, xai.prompt, cache_implementation="quantized", cache_config={"backend": "nonsense"})


# --------------------------------------------------------------------------------------------------------------------
# Going on
# --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_goes_on_from_its_own_cache(model, xai, kind):
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    options = {"past_key_values": cache, "return_dict_in_generate": True, "disable_compile": True}
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    first = generated(model, xai.prompt, new=8, **options)
    second = generated(model, first.sequences, new=12, **options)
    hook.remove()
    assert second.sequences[0, 12:].tolist() == xai.greedy.tolist()
    assert lengths == [12] + [1] * 19  # nothing is read twice


def test_a_prompt_is_read_once_for_many_questions(model, xai):
    """The usual prefix cache: a copy of it for each continuation, in a batch of its own shape."""
    prefix, questions = xai.prompt[:, :9], [[4, 5], [200, 7, 9, 11], [33]]
    with torch.no_grad():
        read = model(prefix, past_key_values=DynamicCache(config=model.config)).past_key_values
    for question in questions:
        tokens = torch.cat((prefix, torch.tensor([question])), dim=1)
        expected = generated(model, tokens, new=8)
        assert torch.equal(generated(model, tokens, new=8, past_key_values=copy.deepcopy(read)), expected)
    assert read.get_seq_length() == 9


def test_a_cache_that_was_cut_goes_on_from_there(model, xai):
    output = generated(model, xai.prompt, return_dict_in_generate=True)
    cache = output.past_key_values
    cache.crop(-15)  # tokens; 16 of 31 are left
    again = generated(model, output.sequences[:, :17], new=15, past_key_values=cache)
    assert again[0, 12:].tolist() == xai.greedy.tolist()


def test_prompts_may_be_given_as_embeddings(model, xai):
    embeds = model.get_input_embeddings()(xai.prompt).detach()
    output = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(xai.prompt),
        generation_config=GenerationConfig(max_new_tokens=20, do_sample=False),
    )
    assert output[0].tolist() == xai.greedy.tolist()
