"""bfloat16: near xAI's float32 as far as xAI's own bfloat16 is, and each module exact to the rounding of its casts.

Random networks amplify rounding, and a router that flips is a coin toss: logits can only be compared as a whole. What
discriminates is a module alone, given the same bfloat16 inputs, against float64 with a cast where xAI has one.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.modeling_grok1 import (
    Grok1Attention,
    Grok1Embedding,
    Grok1Experts,
    Grok1LinearExperts,
    Grok1RMSNorm,
    Grok1RotaryEmbedding,
    Grok1TopKRouter,
    apply_rotary,
    rounded_by_dtype,
)


BF16 = torch.bfloat16
UNIT = 2.0**-8  # bfloat16 has 8 significant bits: rounding moves a number by at most this part of it


def rounded(x: torch.Tensor) -> torch.Tensor:
    """A cast of xAI's: to bfloat16, and on in float64."""
    return x.to(BF16).double()


def assert_same_but_for_ties(actual: torch.Tensor, expected: torch.Tensor, exact: float) -> None:
    """`expected`, computed in float64, rounds to `actual`: exactly for that share of the elements, and nowhere further
    away than float32 sums of another order can push the casts on the way."""
    assert actual.dtype == BF16
    assert (actual == expected.to(BF16)).double().mean() >= exact
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= UNIT


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def normal(generator, *shape, scale=1.0, dtype=BF16):
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


@torch.no_grad()
def test_the_error_is_at_most_3_times_that_of_xais_own_bf16(converted, reference):
    """Root mean square, pooled over both checkpoints and all positions."""
    ours, theirs = [], []
    for name in ("tiny-1", "tiny-8"):
        exact, theirs_bf16 = reference(name, "fp32"), reference(name, "bf16")
        model = AutoModelForCausalLM.from_pretrained(converted(name, "bfloat16"), dtype=BF16)
        logits = model(exact.tokens, attention_mask=exact.attention_mask).logits
        assert logits.dtype == BF16
        ours.append((logits.float() - exact.logits).flatten())
        theirs.append((theirs_bf16.logits - exact.logits).flatten())
    ratio = torch.cat(ours).square().mean().sqrt() / torch.cat(theirs).square().mean().sqrt()
    assert torch.cat(theirs).abs().max() > 0.01  # bfloat16 does differ
    assert ratio <= 3.0


def test_multipliers_are_rounded_to_the_compute_dtype():
    released = GrokConfig()
    assert rounded_by_dtype(released.embedding_multiplier_scale)[BF16] == 78.5
    assert rounded_by_dtype(released.output_multiplier_scale)[BF16] == 0.578125
    float32 = rounded_by_dtype(released.embedding_multiplier_scale)[torch.float32]
    assert float32 == torch.tensor(78.38367176906169, dtype=torch.float32).item() != 78.5


@torch.no_grad()
def test_the_model_multiplies_by_78_5_and_0_578125_in_bf16(small_config, generator):
    small_config.embedding_multiplier_scale = GrokConfig().embedding_multiplier_scale
    model = Grok1ForCausalLM(small_config).to(BF16)
    tokens = torch.arange(small_config.vocab_size)[None]
    embeds = model.get_input_embeddings()(tokens)
    assert torch.equal(embeds, (model.model.embed_tokens.weight.double() * 78.5).to(BF16)[None])
    hidden = model.model(tokens).last_hidden_state
    expected = (model.lm_head(hidden).double() * 0.578125).to(BF16)
    assert torch.equal(model(tokens).logits, expected)


def test_multipliers_do_not_follow_a_float32_model_into_bf16():
    embedding = Grok1Embedding(4, 8, 78.38367176906169)
    assert embedding(torch.tensor([1]))[0, 0] == embedding.weight[1, 0] * 78.38367176906169
    embedding = embedding.to(BF16)
    assert embedding(torch.tensor([1]))[0, 0] == (embedding.weight[1, 0].double() * 78.5).to(BF16)


@torch.no_grad()
def test_norm(generator):
    norm = Grok1RMSNorm(256, 1e-5)
    norm.weight.copy_(torch.rand(256, generator=generator) + 0.5)
    x = normal(generator, 64, 256, scale=3e-3)  # small, so that eps counts
    expected = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert_same_but_for_ties(norm(x), expected, exact=0.999)
    assert torch.equal(norm.to(BF16)(x), norm.to(BF16).float()(x))  # upcast in forward, whatever is stored


@torch.no_grad()
def test_router(generator, small_config):
    router = Grok1TopKRouter(small_config)
    router.weight.copy_(normal(generator, 8, 32, scale=0.2, dtype=torch.float32))
    x = normal(generator, 512, 32)
    logits, gates, experts = router(x)
    exact = x.double() @ router.weight.double().T
    probabilities, chosen = exact.softmax(-1).topk(2, dim=-1)  # over all experts, and not renormalised
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(experts, chosen)
    assert_same_but_for_ties(gates, probabilities, exact=0.999)
    assert gates.float().sum(-1).mean() < 0.9

    with torch.autocast("cpu", dtype=BF16):
        assert torch.equal(router(x)[0], logits)


@torch.no_grad()
def test_rotary_embedding(generator, small_config):
    small_config.head_dim = 64
    positions = torch.tensor([[0, 1, 7, 100, 8191]])
    cos, sin = Grok1RotaryEmbedding(small_config)(torch.empty(1, 5, 8, dtype=BF16), positions)
    assert cos.dtype == sin.dtype == torch.float32
    x = normal(generator, 1, 4, 5, 64)
    angle = positions[0, :, None].double() * 10000.0 ** (-torch.arange(0, 64, 2).double() / 64)
    left, right = x.double()[..., :32], x.double()[..., 32:]
    expected = torch.cat((left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()), dim=-1)
    # Angles of thousands are float32 products, exact to 1e-3 and less: xAI's are too.
    near = expected[..., :4, :]
    assert_same_but_for_ties(apply_rotary(x, cos, sin)[..., :4, :], near, exact=0.99)
    torch.testing.assert_close(apply_rotary(x, cos, sin).double(), expected, rtol=2 * UNIT, atol=5e-3)


def attention_in_float64(attention, x, mask):
    """xAI's attention with its casts: projections, rotary embedding, scores, softmax and output."""
    config, d = attention.config, attention.head_dim
    length = x.shape[1]
    weights = {name: module.weight.double() for name, module in attention.named_children()}
    query, key, value = (
        rounded(x.double() @ weights[f"{p}_proj"].T).view(1, length, -1, d).transpose(1, 2) for p in "qkv"
    )
    angle = torch.arange(length).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angle.cos(), angle.sin()

    def rotate(h):
        left, right = h.chunk(2, dim=-1)
        return rounded(torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1))

    group = config.num_attention_heads // config.num_key_value_heads
    query, key = rotate(query), rotate(key).repeat_interleave(group, dim=1)
    scores = rounded(query @ key.transpose(2, 3)) * config.attn_output_multiplier
    scores = 30.0 * torch.tanh(scores / 30.0)
    probabilities = rounded(scores.masked_fill(mask, -1e30).softmax(-1))
    output = rounded(probabilities @ value.repeat_interleave(group, dim=1))
    return output.transpose(1, 2).reshape(1, length, -1) @ weights["o_proj"].T


@torch.no_grad()
def test_attention(generator, small_config):
    small_config.head_dim, small_config.num_attention_heads = 32, 6
    small_config._attn_implementation = "eager"
    attention = Grok1Attention(small_config, 0)
    for module in attention.children():
        module.weight.copy_(normal(generator, *module.weight.shape, scale=0.5))
    attention = attention.to(BF16)
    x = normal(generator, 1, 24, 32)
    later = torch.ones(24, 24).triu(1).bool()
    mask = torch.zeros(1, 1, 24, 24, dtype=BF16).masked_fill(later, torch.finfo(BF16).min)
    rotary = Grok1RotaryEmbedding(small_config)(x, torch.arange(24)[None])
    actual, _ = attention(x, rotary, mask)
    expected = attention_in_float64(attention, x, later)
    assert_same_but_for_ties(actual, expected, exact=0.98)


EXPERTS = ["eager", "grouped_mm", "batched_mm", "linear"]


@torch.no_grad()
@pytest.mark.parametrize("implementation", EXPERTS)
def test_experts(generator, small_config, implementation):
    small_config._experts_implementation = implementation if implementation != "linear" else "eager"
    fused = Grok1Experts(small_config)
    fused.gate_up_proj.copy_(normal(generator, *fused.gate_up_proj.shape, scale=0.3))
    fused.down_proj.copy_(normal(generator, *fused.down_proj.shape, scale=0.3))
    fused = fused.to(BF16)
    module = fused
    if implementation == "linear":
        module = Grok1LinearExperts(small_config).to(BF16)
        for e, expert in enumerate(module):
            expert.w1.weight.copy_(fused.gate_up_proj[e, :48])
            expert.w3.weight.copy_(fused.gate_up_proj[e, 48:])
            expert.w2.weight.copy_(fused.down_proj[e])
    x = normal(generator, 64, 32)
    scores = torch.randn(64, 8, generator=generator)
    gates, chosen = scores.softmax(-1).topk(2, dim=-1)
    gates = gates.to(BF16)
    actual = module(x, chosen, gates)

    expected = torch.zeros(64, 32, dtype=torch.float64)
    for slot in range(2):
        for token in range(64):
            e = chosen[token, slot]
            gate, up = rounded(fused.gate_up_proj[e].double() @ x[token].double()).chunk(2)
            hidden = rounded(rounded(F.gelu(gate, approximate="tanh")) * up)
            down = rounded(fused.down_proj[e].double() @ hidden)
            expected[token] += gates[token, slot].double() * down
    # The product with the gate and the sum of the two experts are rounded once or twice, as the kernel likes.
    error = (actual.double() - expected).norm() / expected.norm()
    assert actual.dtype == BF16
    assert error <= UNIT
