"""A bitsandbytes model keeps its bits through forward passes, saving, reloading and saving again; dequantised, it is
an ordinary model with the same weights."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


METHODS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TOKENS = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29], [31, 37, 41, 43, 47, 53, 59, 61]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GrokConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        max_position_embeddings=128,
        attn_output_multiplier=32**-0.5,
        embedding_multiplier_scale=128**0.5,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("hub")
    Grok1ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


@torch.no_grad()
def run(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS)[0]


def assert_same_state(left: torch.nn.Module, right: torch.nn.Module) -> None:
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModel], ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_saved_after_a_forward_pass_and_saved_again(
    folder: Path, tmp_path: Path, method: str, auto_class: type
) -> None:
    fresh = auto_class.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**METHODS[method]))
    model = auto_class.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**METHODS[method]))
    expected = run(model)
    assert_same_state(model, fresh)  # a forward pass changes nothing
    model.save_pretrained(tmp_path / "once")
    once = auto_class.from_pretrained(tmp_path / "once")
    assert_same_state(once, model)
    assert torch.equal(run(once), expected)
    once.save_pretrained(tmp_path / "twice")
    twice = auto_class.from_pretrained(tmp_path / "twice")
    assert_same_state(twice, model)
    assert torch.equal(run(twice), expected)


@pytest.mark.parametrize("method", METHODS)
def test_dequantised_is_an_ordinary_folder(folder: Path, tmp_path: Path, method: str) -> None:
    options = BitsAndBytesConfig(**METHODS[method], bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=options)
    quantised = run(model)
    model.save_pretrained(tmp_path / "quantised")  # leaves the config with the name of a dtype instead of the dtype
    expert = model.model.layers[1].block_sparse_moe.experts[2].w1
    if method == "int8":
        expected = bnb.functional.int8_vectorwise_dequant(expert.weight.data, expert.state.SCB)
    else:
        expected = bnb.functional.dequantize_4bit(expert.weight.data, expert.weight.quant_state)

    plain = model.dequantize()
    assert torch.equal(plain.model.layers[1].block_sparse_moe.experts[2].w1.weight, expected.float())
    assert all(weight.dtype == torch.float32 for weight in plain.parameters())
    # LLM.int8() rounds the activations to 8 bits too; the others compute with exactly these weights.
    torch.testing.assert_close(run(plain), quantised, rtol=0, atol=0.05 if method == "int8" else 1e-4)

    plain.save_pretrained(tmp_path / "plain")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert reloaded.experts_layout == "fused"
    assert not hasattr(reloaded.config, "quantization_config")
    assert torch.equal(reloaded.model.layers[1].block_sparse_moe.experts.gate_up_proj[2, :256], expected.float())
    torch.testing.assert_close(run(reloaded), run(plain), rtol=0, atol=1e-5)
