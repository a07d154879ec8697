"""Float32 reproduces xAI's logits and greedy tokens through the converter, with every kind of experts."""

import pytest
import torch
from transformers import AutoModelForCausalLM


TOLERANCE = 1e-4  # max abs; float32 reproduces to about 1e-5 (tiny-1) and 7e-5 (tiny-8)

VARIANTS = [("fused", "eager"), ("fused", "grouped_mm"), ("fused", "batched_mm"), ("linear", None)]


def load(folder, layout="fused", experts=None):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_layout=layout, experts_implementation=experts
    )


@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
@pytest.mark.parametrize(("layout", "experts"), VARIANTS)
@torch.no_grad()
def test_logits_equal_xai_everywhere(converted, reference, name, layout, experts):
    golden = reference(name, "fp32")
    model = load(converted(name, "float32"), layout, experts)
    assert model.config._experts_implementation == (experts or "grok1")
    logits = model(golden.tokens, attention_mask=golden.attention_mask).logits
    assert logits.dtype == torch.float32
    padded = golden.attention_mask == 0
    assert padded.any()  # positions after the last real token are part of the claim
    error = (logits - golden.logits).abs()
    assert error.max() <= TOLERANCE
    assert error[padded].max() <= TOLERANCE
    assert golden.logits.std() > 0.1  # the tolerance is small beside what is compared


@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
@pytest.mark.parametrize(("layout", "experts"), VARIANTS)
def test_greedy_decoding_with_the_cache_gives_xais_20_tokens(converted, reference, name, layout, experts):
    golden = reference(name, "fp32")
    model = load(converted(name, "float32"), layout, experts)
    output = model.generate(
        golden.prompt,
        attention_mask=torch.ones_like(golden.prompt),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[0, golden.prompt.shape[1] :].tolist() == golden.greedy.tolist()
    assert (torch.cat(output.logits) - golden.greedy_logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_the_embedding_multiplier_is_inside_the_embedding(converted, reference):
    """`inputs_embeds` are what the first layer reads, so they are not multiplied again."""
    golden = reference("tiny-1", "fp32")
    model = load(converted("tiny-1", "float32"))
    embeds = model.get_input_embeddings()(golden.tokens)
    torch.testing.assert_close(embeds, model.model.embed_tokens.weight[golden.tokens] * 5.656854249492381)
    by_embeds = model(inputs_embeds=embeds, attention_mask=golden.attention_mask).logits
    assert (by_embeds - golden.logits).abs().max() <= TOLERANCE
