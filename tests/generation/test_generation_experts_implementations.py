"""Eager, grouped_mm and batched_mm experts agree, and decoding never copies expert weights."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin

from modeling_grok1 import Grok1ForCausalLM


@pytest.fixture
def load(converted):
    def model(dtype="float32", **options):
        return AutoModelForCausalLM.from_pretrained(converted("tiny-1", dtype), dtype=getattr(torch, dtype), **options)

    return model


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_all_implementations_agree(load, reference, dtype, tolerance):
    golden = reference("tiny-1", "fp32")
    inputs = {"input_ids": golden.tokens, "attention_mask": golden.attention_mask}
    model = load(dtype)
    assert model.get_experts_implementation() == {"": "grok1"}  # what a user gets
    logits = {"grok1": model(**inputs).logits}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        logits[implementation] = model(**inputs).logits
    logits["linear"] = load(dtype, experts_layout="linear")(**inputs).logits
    for name, value in logits.items():
        error = (value.float() - logits["eager"].float()).norm() / logits["eager"].float().norm()
        assert error <= tolerance, name


def test_an_unknown_implementation_is_refused(load):
    with pytest.raises(ValueError, match="experts_implementation"):
        load(experts_implementation="nonsense")


def test_decoding_off_cpu_does_not_switch_to_batched_mm(small_config, monkeypatch):
    small_config._experts_implementation = "grouped_mm"
    model = Grok1ForCausalLM(small_config)
    monkeypatch.setattr(Grok1ForCausalLM, "device", torch.device("cuda"))
    with GenerationMixin._optimize_model_for_decode(model):  # what would happen
        assert model.get_experts_implementation() == {"": "batched_mm"}
    with model._optimize_model_for_decode():
        assert model.get_experts_implementation() == {"": "grouped_mm"}


def test_a_token_of_linear_experts_reads_two_experts_a_layer(load):
    model = load(experts_layout="linear")
    touched = []
    for name, module in model.named_modules():
        if name.endswith((".w1", ".w2", ".w3")):
            module.register_forward_hook(lambda *_, name=name: touched.append(name))
    with torch.no_grad():
        model(torch.tensor([[7]]))
    assert len(touched) == len(set(touched)) == 2 * 3 * model.config.num_hidden_layers
