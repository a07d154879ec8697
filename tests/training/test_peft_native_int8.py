"""Adapters over frozen int8 weights learn what they learn over the same weights as floats, and what would be wrong is
refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_grok1.quantized_grok1 import QuantizedLinear


peft = pytest.importorskip("peft")

EVERYTHING = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"]}


def load(folder: Path, layout: str = "linear", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout, dtype=dtype)


def adapted(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """The model with rank-4 adapters whose both factors are random, so that the first step moves all of them."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, weight in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def gradients(model: torch.nn.Module, golden: Any) -> dict[str, torch.Tensor]:
    model(input_ids=golden.tokens, attention_mask=golden.attention_mask, labels=golden.tokens).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, "fused"),
        (EVERYTHING, "linear"),
        ({"target_modules": "all-linear"}, "linear"),
        (EVERYTHING | {"use_dora": True}, "linear"),
    ],
    ids=["attention-fused", "everything", "all-linear", "dora"],
)
def test_adapters_get_the_gradients_that_they_get_over_floats(converted, reference, options, layout):
    golden = reference("tiny-8", "fp32")
    actual, expected = (
        gradients(adapted(load(converted("tiny-8", dtype), layout), **options), golden)
        for dtype in ("int8", "float32")
    )
    assert actual.keys() == expected.keys()
    adapters = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in actual}
    wanted = options["target_modules"]
    assert adapters == set(EVERYTHING["target_modules"] if wanted == "all-linear" else wanted)
    for name, gradient in expected.items():
        if gradient is None:  # an expert that no token of this layer chose
            assert actual[name] is None, name
        else:
            assert (actual[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name
    assert sum(gradient is not None and bool(gradient.any()) for gradient in actual.values()) > 0.9 * len(actual)


def test_training_leaves_every_int8_weight_and_scale_as_it_was(converted, reference):
    golden = reference("tiny-8", "fp32")
    model = load(converted("tiny-8", "int8"), dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model = adapted(model, **EVERYTHING)
    model.activation_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=golden.tokens, attention_mask=golden.attention_mask, labels=golden.tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    after = model.unload()
    for name, weight in after.named_parameters():
        assert weight.dtype == before[name].dtype, name
        assert torch.equal(weight, before[name]), name
    assert any(weight.dtype == torch.int8 for weight in before.values())


def test_adapters_load_and_merge_into_a_dequantised_model(converted, reference, tmp_path):
    """The wrapped model can be dequantised where it is: `merge_and_unload` then gives an ordinary float model."""
    golden = reference("tiny-8", "fp32")
    model = adapted(load(converted("tiny-8", "int8")), **EVERYTHING).eval()
    with torch.no_grad():
        expected = model(golden.tokens).logits
        model.dequantize()
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(golden.tokens).logits, expected, rtol=0, atol=5e-4)
        merged.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert not any(weight.dtype == torch.int8 for weight in again.parameters())
        torch.testing.assert_close(again(golden.tokens).logits, expected, rtol=0, atol=5e-4)


def test_merging_into_int8_is_refused_and_changes_nothing(converted):
    model = adapted(load(converted("tiny-8", "int8")), **EVERYTHING)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(RuntimeError, match="Char"):
        model.merge_and_unload()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_target_parameters_on_fused_int8_experts_are_refused_with_what_to_use(converted):
    model = load(converted("tiny-8", "int8"), "fused")
    options = peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(ValueError, match=r"`experts_layout='linear'` .* `target_modules=\['w1', 'w2', 'w3'\]`"):
        peft.get_peft_model(model, options)
