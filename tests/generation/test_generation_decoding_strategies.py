"""Every decoding strategy runs; those that promise the greedy result give it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TextStreamer, set_seed

from modeling_grok1.versions_grok1 import RELEASE


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(reference):
    return reference("tiny-1", "fp32")


@pytest.fixture(scope="module")
def generate(expected):
    """generate(model, ...): 20 new tokens after the golden prompt."""

    def run(model, **options):
        options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False, **options}
        output = model.generate(expected.prompt, attention_mask=torch.ones_like(expected.prompt), **options)
        return output[:, expected.prompt.shape[1] :]

    return run


def test_prompt_lookup_decoding_is_greedy(model, expected, generate):
    assert generate(model, prompt_lookup_num_tokens=3)[0].tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("assistant_layers", [1, 3])
def test_assisted_decoding_is_greedy(converted, model, expected, generate, assistant_layers):
    assistant = AutoModelForCausalLM.from_pretrained(
        converted("tiny-1", "float32"), dtype=torch.float32, num_hidden_layers=assistant_layers
    )
    assert generate(model, assistant_model=assistant)[0].tolist() == expected.greedy.tolist()


def test_drafts_of_the_models_own_first_layer_are_greedy(model, expected, generate):
    calls = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, assistant_early_exit=1)[0].tolist() == expected.greedy.tolist()
    hook.remove()
    assert len(calls) > 20  # it drafted
    assert model.config.num_hidden_layers == 3


def test_drafts_are_sampled_too(converted, model, expected, generate):
    assistant = AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)
    sampled = generate(model, assistant_model=assistant, do_sample=True, top_k=1)
    assert sampled[0].tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_drafts_with_a_static_cache(model, expected, generate, options):
    """Up to Transformers 5.23 a static cache cannot take drafts back, and they are refused."""
    if RELEASE < (5, 24):
        with pytest.raises(ValueError, match="assisted generate is not supported with Static cache"):
            generate(model, cache_implementation="static", **options)
    else:
        assert generate(model, cache_implementation="static", **options)[0].tolist() == expected.greedy.tolist()


@torch.no_grad()
def test_beam_search_finds_a_sequence_at_least_as_likely(model, expected, generate):
    def log_likelihood(continuation):
        tokens = torch.cat((expected.prompt, continuation[None]), dim=1)
        logprobs = model(tokens).logits[0, expected.prompt.shape[1] - 1 : -1].log_softmax(-1)
        return logprobs.gather(1, continuation[:, None]).sum()

    beams = generate(model, num_beams=4, num_return_sequences=4, max_new_tokens=8)
    assert len({tuple(beam.tolist()) for beam in beams}) == 4
    likelihoods = [log_likelihood(beam) for beam in beams]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert likelihoods[0] >= log_likelihood(expected.greedy[:8]) - 1e-4


def test_sampling_follows_the_seed_and_top_1_is_greedy(model, expected, generate):
    def sample(seed, **options):
        set_seed(seed)
        return generate(model, do_sample=True, **options)[0].tolist()

    assert sample(0, temperature=1.5) == sample(0, temperature=1.5) != sample(1, temperature=1.5)
    assert sample(0, top_k=1) == expected.greedy.tolist()


def test_streaming_sees_every_token(model, expected, generate):
    class Recorder(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Recorder()
    generate(model, streamer=streamer)
    assert streamer.tokens == expected.prompt[0].tolist() + expected.greedy.tolist()
    assert streamer.ended


def test_linear_experts_generate_the_same(converted, expected, generate):
    model = AutoModelForCausalLM.from_pretrained(
        converted("tiny-1", "float32"), dtype=torch.float32, experts_layout="linear"
    )
    assert generate(model)[0].tolist() == expected.greedy.tolist()
    assert generate(model, cache_implementation="static")[0].tolist() == expected.greedy.tolist()  # and never compiles
