"""Each mistake that other ports of Grok-1 made, made here on purpose, fails the golden comparison by far."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from grok1.conversion import layout, names
from grok1.conversion.convert import convert
from modeling_grok1 import modeling_grok1 as model_file
from modeling_grok1.modeling_grok1 import Grok1RMSNorm, Grok1TopKRouter


TOLERANCE = 1e-4


@torch.no_grad()
def max_abs_error(model, golden) -> float:
    logits = model(golden.tokens, attention_mask=golden.attention_mask).logits
    return (logits - golden.logits).abs().max().item()


def assert_equals_xai(error: float) -> None:
    assert error <= TOLERANCE


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_activation(name):
    def patch(model, monkeypatch):
        monkeypatch.setattr(model_file, "geglu", lambda gate, up: ACT2FN[name](gate) * up)

    return patch


def theta_1e5(model, monkeypatch):
    rotary = model.model.rotary_emb
    exponent = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    monkeypatch.setitem(rotary._buffers, "inv_freq", 1.0 / 1e5**exponent)


def with_router(change):
    def patch(model, monkeypatch):
        def forward(self, x):
            logits, gates, experts = change(F.linear(x, self.weight), x, self.weight, self.top_k)
            return logits, gates, experts

        monkeypatch.setattr(Grok1TopKRouter, "forward", forward)

    return patch


def bf16_router(logits, x, weight, top_k):
    logits = F.linear(x.bfloat16(), weight.bfloat16()).float()
    return logits, *logits.softmax(-1).topk(top_k)


def capped_router(logits, x, weight, top_k):
    logits = 30.0 * torch.tanh(logits / 30.0)
    return logits, *logits.softmax(-1).topk(top_k)


def renormalised_gates(logits, x, weight, top_k):
    gates, experts = logits.softmax(-1).topk(top_k)
    return logits, gates / gates.sum(-1, keepdim=True), experts


def hard_clamp(model, monkeypatch):
    monkeypatch.setattr(model_file, "soft_cap", lambda scores, cap: scores.clamp(-cap, cap))


def no_cap(model, monkeypatch):
    monkeypatch.setattr(model_file, "soft_cap", lambda scores, cap: scores)


def eps_1e6(model, monkeypatch):
    for module in model.modules():
        if isinstance(module, Grok1RMSNorm):
            monkeypatch.setattr(module, "eps", 1e-6)


MODEL_TRAPS = {
    "erf GELU": with_activation("gelu"),
    "SiLU": with_activation("silu"),
    "theta 1e5": theta_1e5,
    "router in bf16": with_router(bf16_router),
    "soft-cap 30 on the router": with_router(capped_router),
    "renormalised gates": with_router(renormalised_gates),
    "clamp instead of tanh": hard_clamp,
    "no soft-cap": no_cap,
    "eps 1e-6": eps_1e6,
}


def numeric_layer_order(monkeypatch):
    monkeypatch.setattr(names, "xai_layer_order", lambda num_layers: list(range(num_layers)))


def interleaved_scale_rows(monkeypatch):
    def dequantise(weight, scales):
        rows = torch.arange(weight.shape[-2]) % scales.shape[-2]
        return weight.float() * scales.float()[..., rows, :]

    monkeypatch.setattr(layout, "dequantise", dequantise)


def scales_rounded_away(monkeypatch):
    """--dtype float32 that passes through bfloat16."""
    exact = layout.dequantise
    monkeypatch.setattr(layout, "dequantise", lambda weight, scales: exact(weight, scales).bfloat16().float())


CONVERTER_TRAPS = {
    "numeric layer order": numeric_layer_order,
    "interleaved scale rows": interleaved_scale_rows,
    "weights rounded to bf16": scales_rounded_away,
}


@pytest.mark.parametrize("trap", MODEL_TRAPS)
def test_a_wrong_model_fails(converted, reference, monkeypatch, trap):
    golden = reference("tiny-8", "fp32")
    model = load(converted("tiny-8", "float32"))
    clean = max_abs_error(model, golden)
    assert_equals_xai(clean)

    with monkeypatch.context() as patched:
        MODEL_TRAPS[trap](model, patched)
        wrong = max_abs_error(model, golden)
    with pytest.raises(AssertionError):
        assert_equals_xai(wrong)
    assert wrong >= 10 * clean

    assert max_abs_error(model, golden) == clean


@pytest.mark.parametrize("trap", CONVERTER_TRAPS)
def test_a_wrong_converter_fails(golden, converted, reference, monkeypatch, tmp_path, trap):
    expected = reference("tiny-8", "fp32")
    clean = max_abs_error(load(converted("tiny-8", "float32")), expected)
    assert_equals_xai(clean)

    CONVERTER_TRAPS[trap](monkeypatch)
    convert(golden / "tiny-8", tmp_path / "wrong", dtype="float32", no_tokenizer=True)
    wrong = max_abs_error(load(tmp_path / "wrong"), expected)
    with pytest.raises(AssertionError):
        assert_equals_xai(wrong)
    assert wrong >= 10 * clean
