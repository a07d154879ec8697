"""Where the padding lies, and how the keys and values are kept, changes nothing for the real tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache


TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), dtype=torch.float32)


@pytest.fixture(scope="module")
def row(reference):
    """The unpadded row of the golden tokens, and xAI's logits for it."""
    golden = reference("tiny-1", "fp32")
    assert (golden.tokens[0] != 0).all()
    return golden.tokens[:1], golden.logits[0]


@torch.no_grad()
@pytest.mark.parametrize("pad_id", [0, 77])  # the model never looks at ids, only at the mask
def test_left_right_and_no_padding_agree(model, row, pad_id):
    tokens, expected = row
    length, total = 20, 28
    variants = {"none": (0, length), "left": (total - length, total), "right": (0, length), "both": (3, 3 + length)}
    for name, (start, stop) in variants.items():
        width = length if name == "none" else total
        ids = torch.full((1, width), pad_id)
        mask = torch.zeros(1, width, dtype=torch.long)
        ids[:, start:stop], mask[:, start:stop] = tokens[:, :length], 1
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=position_ids).logits[0, start:stop]
        assert (logits - expected[:length]).abs().max() <= TOLERANCE, name


@torch.no_grad()
def test_positions_are_relative(model, row):
    """Without position_ids, left padding shifts every position alike, which rotary embeddings do not see."""
    tokens, expected = row
    ids = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), dim=1)
    mask = (torch.arange(ids.shape[1]) >= 5).long()[None]
    assert (model(ids, attention_mask=mask).logits[0, 5:] - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_batch_of_mixed_padding_generates_what_each_prompt_does_alone(model, reference):
    golden = reference("tiny-1", "fp32")
    prompts = [golden.prompt[0], golden.tokens[0, :7], golden.tokens[0, 3:12]]
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)
        assert torch.equal(together[i], alone[0, len(prompt) :])


def in_pieces(model, tokens, cache, pieces):
    """The logits of all tokens, computed piece after piece."""
    start, logits = 0, []
    for piece in pieces:
        ids = tokens[:, start : start + piece]
        output = model(ids, past_key_values=cache, use_cache=True)
        logits.append(output.logits)
        assert output.past_key_values is cache
        start += piece
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1)[0]


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[32], [12, 20], [1] * 32, [5, 9, 1, 1, 16]], ids=str)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_and_chunked_prefill_agree_with_no_cache(model, row, kind, pieces):
    tokens, expected = row
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    logits = in_pieces(model, tokens, cache, pieces)
    assert (logits - expected).abs().max() <= TOLERANCE
    assert cache.get_seq_length() == 32
    config = model.config
    keys = cache.layers[0].keys
    # Key heads, not query heads: a sixth of the memory in the released model.
    assert keys.shape[1] == config.num_key_value_heads < config.num_attention_heads


@torch.no_grad()
def test_a_cache_is_made_where_it_is_asked_for(model, row):
    tokens, _ = row
    assert model(tokens, use_cache=False).past_key_values is None
    assert isinstance(model(tokens, use_cache=True).past_key_values, DynamicCache)
    assert isinstance(model(tokens).past_key_values, DynamicCache)  # config.use_cache


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "prefill_chunk_size": 4},
    ],
    ids=str,
)
def test_generate_gives_the_golden_tokens_with_every_cache(model, reference, options):
    golden = reference("tiny-1", "fp32")
    output = model.generate(
        golden.prompt,
        attention_mask=torch.ones_like(golden.prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        disable_compile=True,
        **options,
    )
    assert output[0, golden.prompt.shape[1] :].tolist() == golden.greedy.tolist()


@torch.no_grad()
def test_logits_to_keep(model, row):
    tokens, _ = row
    everything = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=0).logits, everything)
    for kept, positions in ((1, slice(-1, None)), (5, slice(-5, None)), (torch.tensor([3, 9]), torch.tensor([3, 9]))):
        logits = model(tokens, logits_to_keep=kept).logits
        torch.testing.assert_close(logits, everything[:, positions], rtol=0, atol=1e-6)


@torch.no_grad()
def test_ids_or_embeddings_never_both_nor_neither(model, row):
    tokens, _ = row
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(tokens, inputs_embeds=model.get_input_embeddings()(tokens))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
