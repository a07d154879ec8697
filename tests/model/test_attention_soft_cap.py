"""30 * tanh(s / 30) is in every attention implementation that the model offers; what cannot do it is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_flash_attention_utils

from modeling_grok1 import Grok1ForCausalLM
from modeling_grok1 import modeling_grok1 as model_file


TOLERANCE = 1e-4


@pytest.fixture
def sharp(small_config):
    """A model whose scores are far above 30, so that the cap decides what it says."""
    torch.manual_seed(0)
    model = Grok1ForCausalLM(small_config).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=1.5)
        torch.nn.init.normal_(layer.self_attn.v_proj.weight, std=0.5)
    return model


@pytest.fixture
def batch():
    """Tokens and a mask with padding on the left, on the right and on neither side."""
    tokens = torch.randint(3, 96, (3, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, 12:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def test_the_sharp_model_shows_a_missing_cap(sharp, batch, monkeypatch):
    """Else every comparison below would prove nothing."""
    scores = []
    soft_cap = model_file.soft_cap
    monkeypatch.setattr(model_file, "soft_cap", lambda x, cap: scores.append(x.abs().max() / cap) or soft_cap(x, cap))
    capped = sharp(**batch).logits
    assert max(scores) > 2
    monkeypatch.setattr(model_file, "soft_cap", lambda x, cap: x)
    assert (sharp(**batch).logits - capped).abs().max() > 100 * TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])  # 30 s to compile
@pytest.mark.filterwarnings("ignore:_compile flag", "ignore:flex_attention called without torch.compile")
def test_flex_attention_carries_the_cap(sharp, batch, stance):
    expected = sharp(**batch).logits
    sharp.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance(stance):
        actual = sharp(**batch).logits
    real = batch["attention_mask"].bool()
    assert (actual - expected)[real].abs().max() <= TOLERANCE


class StandInFlashAttention:
    """FlashAttention 2's functions in plain torch; notes every `softcap` that it is given."""

    def __init__(self):
        self.softcaps = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, **kwargs
    ):
        self.softcaps.append(softcap)
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            later = torch.ones(scores.shape[-2:]).triu(1 + scores.shape[-1] - scores.shape[-2]).bool()
            scores = scores.masked_fill(later, -torch.inf)
        return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        **kwargs,
    ):
        sequences = [
            self.flash_attn_func(
                q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], 0.0, softmax_scale, causal, softcap=softcap
            )[0]
            for q0, q1, k0, k1 in zip(
                cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
            )
        ]
        return torch.cat(sequences)


@pytest.fixture
def flash(monkeypatch):
    stand_in = StandInFlashAttention()
    utils = modeling_flash_attention_utils
    functions = (stand_in.flash_attn_func, stand_in.flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    # What the first use remembers, forgotten again after the test.
    for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
        monkeypatch.setattr(utils, name, None)
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn", "_loaded_implementation"):
        monkeypatch.setattr(utils, name, None)
    return stand_in


@torch.no_grad()
def test_flash_attention_2_is_given_the_cap(sharp, batch, flash):
    alone = {"input_ids": batch["input_ids"]}
    expected, expected_alone = sharp(**batch).logits, sharp(**alone).logits
    sharp.config._attn_implementation_internal = "flash_attention_2"  # as if flash-attn were installed

    assert (sharp(**alone).logits - expected_alone).abs().max() <= TOLERANCE
    assert flash.softcaps == [30.0] * sharp.config.num_hidden_layers

    real = batch["attention_mask"].bool()
    assert (sharp(**batch).logits - expected)[real].abs().max() <= TOLERANCE
    assert set(flash.softcaps) == {30.0}

    generated = sharp.generate(**alone, max_new_tokens=4, do_sample=False, eos_token_id=None)
    sharp.set_attn_implementation("eager")
    assert torch.equal(generated, sharp.generate(**alone, max_new_tokens=4, do_sample=False, eos_token_id=None))
    assert set(flash.softcaps) == {30.0}


def test_eager_is_what_a_user_gets(converted):
    folder = converted("tiny-1", "float32")
    assert AutoModelForCausalLM.from_pretrained(folder).config._attn_implementation == "eager"


@pytest.mark.parametrize("sdpa", ["sdpa", "paged|sdpa"])
@pytest.mark.filterwarnings("ignore:The `paged")
def test_sdpa_is_refused_with_a_sentence_that_says_what_to_use(converted, small_config, sdpa):
    sentence = r"cap.*30 \* tanh.*use 'eager' \(the default\), 'flex_attention' or 'flash_attention_2'"
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32"), attn_implementation=sdpa)
    with pytest.raises(ValueError, match=sentence):
        AutoModelForCausalLM.from_config(small_config, attn_implementation=sdpa)
    small_config._attn_implementation = "eager"
    model = Grok1ForCausalLM(small_config)
    with pytest.raises(ValueError, match=sentence):
        model.set_attn_implementation(sdpa)
    assert model.config._attn_implementation == "eager"


def test_paged_attention_is_refused_outside_continuous_batching(sharp, batch):
    """It would attend to what follows."""
    sharp.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match="continuous batching"):
        sharp(**batch)


@torch.no_grad()
def test_attention_weights_are_those_that_were_used(sharp, batch):
    attentions = sharp(**batch, output_attentions=True).attentions
    assert len(attentions) == sharp.config.num_hidden_layers
    assert attentions[0].shape == (3, 4, 16, 16)
    real = batch["attention_mask"].bool()
    rows = attentions[0].transpose(1, 2)[real]  # real queries, heads, keys
    torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
    assert attentions[0][1, :, :, 12:][:, :12].abs().max() == 0  # padded keys get nothing
