"""4-D masks are read by their dtype or refused, and widths for which torch has no grouped product are computed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_grok1 import GrokConfig


T = 9
IDS = torch.randint(3, 96, (2, T), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(T, T).tril()


@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_masks_of_bools_and_integers_say_what_is_seen(model, dtype, shape):
    mask = CAUSAL.to(dtype).expand(*shape, T, T)
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits, model(IDS).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_floating_masks_are_added_and_those_of_0_and_1_refused(model):
    added = torch.zeros(T, T).masked_fill(CAUSAL == 0, torch.finfo(torch.float32).min).expand(2, 1, T, T)
    torch.testing.assert_close(model(IDS, attention_mask=added).logits, model(IDS).logits, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="found 1"):
        model(IDS, attention_mask=CAUSAL.expand(2, 1, T, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "expert"), [(33, 21), (36, 30), (34, 64), (64, 17)])
def test_rows_that_are_no_multiple_of_16_bytes(width, expert, dtype):
    config = GrokConfig(
        vocab_size=96,
        hidden_size=width,
        intermediate_size=expert,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        num_experts=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model(IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_experts_implementation("eager")
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    model.set_experts_implementation("grok1")
    assert model.eval().generate(IDS, max_new_tokens=3, min_new_tokens=3).shape == (2, T + 3)
