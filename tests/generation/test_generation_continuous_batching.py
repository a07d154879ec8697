"""`generate_batch` says what `generate` says, with room for all requests or for one at a time, and the comparison
would notice a missing soft-cap."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus
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


def requests(model, prompts, pages=64, batch=32, eos=-1):
    """What came of each prompt; a page holds 4 tokens of a layer, and a request needs whole pages."""
    outputs = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=4, num_blocks=pages, max_batch_tokens=batch, use_cuda_graph=False
        ),
        progress_bar=False,
    )
    by_prompt = {tuple(output.prompt_ids): output for output in outputs.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


def continuously(model, prompts, **options):
    return [request.generated_tokens for request in requests(model, prompts, **options)]


def test_generate_batch_equals_generate(sharp, prompts):
    expected = one_by_one(sharp, prompts)
    assert continuously(sharp, prompts) == expected
    assert sharp.config._attn_implementation == "eager"  # set back afterwards
    assert one_by_one(sharp, prompts) == expected


def test_generate_batch_equals_generate_with_linear_experts(sharp, prompts, tmp_path):
    sharp.save_pretrained(tmp_path)
    linear = Grok1ForCausalLM.from_pretrained(tmp_path, experts_layout="linear")
    assert continuously(linear, prompts) == one_by_one(sharp, prompts)


@pytest.fixture
def many():
    """12 prompts of 3 to 16 tokens: with their answers they need 3 to 6 pages each, 54 together."""
    generator = torch.Generator().manual_seed(5)
    lengths = (5, 11, 3, 16, 9, 7, 12, 4, 15, 6, 8, 10)
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
    assert sum(-(-(length + NEW_TOKENS) // 4) for length in lengths) == 54
    return prompts


@pytest.mark.parametrize(("pages", "batch"), [(64, 64), (20, 16), (6, 8)])
def test_more_requests_than_fit_wait_for_their_turn(sharp, many, pages, batch):
    """With 6 pages the longest request has the cache to itself, and none of its prompt fits a batch at once."""
    assert continuously(sharp, many, pages=pages, batch=batch) == one_by_one(sharp, many)


def test_a_request_that_never_fits_fails_and_says_why(sharp, many):
    """16 tokens and their answer are 6 pages: it is told so instead of waiting for ever."""
    (answer,) = requests(sharp, [many[3]], pages=4, batch=8)
    assert answer.status == RequestStatus.FAILED
    assert "No requests can be scheduled" in answer.error
    assert requests(sharp, [many[2]], pages=4, batch=8)[0].generated_tokens == one_by_one(sharp, [many[2]])[0]


def test_each_request_ends_at_its_own_end_token(sharp, many):
    expected = one_by_one(sharp, many)
    eos = expected[0][3]
    cut = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in expected]
    assert len({len(tokens) for tokens in cut}) > 1
    assert continuously(sharp, many, eos=eos) == cut


def test_without_the_cap_they_differ(sharp, prompts, monkeypatch):
    """Transformers' own paged attention drops `softcap`; the model's does not."""
    expected = one_by_one(sharp, prompts)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "paged|eager", eager_paged_attention_forward)
    assert continuously(sharp, prompts) != expected
