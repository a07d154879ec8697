"""`generate_batch` says what `generate` says, and the comparison would notice a missing soft-cap."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.integrations.eager_paged import eager_paged_attention_forward

from modeling_grok1 import Grok1ForCausalLM
from modeling_grok1.modeling_grok1 import ALL_ATTENTION_FUNCTIONS


NEW_TOKENS = 8


@pytest.fixture
def sharp(small_config):
    """Scores far above 30: without the cap other tokens win."""
    torch.manual_seed(3)
    model = Grok1ForCausalLM(small_config).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=1.5)
        torch.nn.init.normal_(layer.self_attn.v_proj.weight, std=0.5)
    return model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (5, 11, 3, 16, 9)]


def one_by_one(model, prompts):
    return [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def continuously(model, prompts):
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            block_size=4, num_blocks=64, max_batch_tokens=32, use_cuda_graph=False
        ),
        progress_bar=False,
    )
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def test_generate_batch_equals_generate(sharp, prompts):
    expected = one_by_one(sharp, prompts)
    assert continuously(sharp, prompts) == expected
    assert sharp.config._attn_implementation == "eager"  # set back afterwards
    assert one_by_one(sharp, prompts) == expected


def test_generate_batch_equals_generate_with_linear_experts(sharp, prompts, tmp_path):
    sharp.save_pretrained(tmp_path)
    linear = Grok1ForCausalLM.from_pretrained(tmp_path, experts_layout="linear")
    assert continuously(linear, prompts) == one_by_one(sharp, prompts)


def test_without_the_cap_they_differ(sharp, prompts, monkeypatch):
    """Transformers' own paged attention drops `softcap`; the model's does not."""
    expected = one_by_one(sharp, prompts)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "paged|eager", eager_paged_attention_forward)
    assert continuously(sharp, prompts) != expected
