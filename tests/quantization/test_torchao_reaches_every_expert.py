"""torchao's int8 and float8 reach the experts, by name in the fused layout and automatically in the linear one; needs
torchao (`pip install torchao`)."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


pytest.importorskip("torchao")

from torchao.quantization import (
    Float8WeightOnlyConfig,
    FqnToConfig,
    Int8WeightOnlyConfig,
)


CONFIGS = {"int8": (Int8WeightOnlyConfig, 0.02), "float8": (Float8WeightOnlyConfig, 0.06)}
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


def by_name(config: object) -> FqnToConfig:
    return FqnToConfig({r"re:.*experts\.(gate_up|down)_proj": config, "_default": config})


@torch.no_grad()
def run(model: torch.nn.Module) -> torch.Tensor:
    return model(TOKENS)[0]


def experts_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if ".experts." in name}


@pytest.mark.parametrize("layout", ["linear", "fused"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_are_quantised_saved_and_reloaded(
    folder: Path, tmp_path: Path, kind: str, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    config_class, limit = CONFIGS[kind]
    quantization = TorchAoConfig(config_class() if layout == "linear" else by_name(config_class()))
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    assert model.experts_layout == layout
    assert "expert matrices" not in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout)
    originals = experts_of(plain)
    assert len(experts_of(model)) == (24 if layout == "linear" else 4)
    for name, weight in experts_of(model).items():
        assert weight.qdata.element_size() == 1, name
        original = originals[name].float()
        assert (weight.dequantize().float() - original).norm() < limit * original.norm(), name
    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "gate.weight", "embed_tokens.weight", "lm_head.weight")):
            assert type(weight) is torch.nn.Parameter, name

    expected = run(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.experts_layout == layout
    assert torch.equal(run(reloaded), expected)


def test_fused_int8_runs_its_experts_one_by_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The grouped product, which is the default, ends in a NotImplementedError on torchao's int8."""
    quantization = TorchAoConfig(by_name(Int8WeightOnlyConfig()))
    with caplog.at_level(logging.WARNING):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    assert model.config._experts_implementation == "eager"
    assert "no grouped product" in caplog.text


def test_fused_experts_that_no_name_reaches_are_warned_about(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantization = TorchAoConfig(FqnToConfig({"_default": Int8WeightOnlyConfig()}))
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    (warning,) = [r.getMessage() for r in caplog.records if "expert matrices" in r.getMessage()]
    assert "left 4 of 4 expert matrices in torch.bfloat16" in warning
    assert r"re:.*experts\.(gate_up|down)_proj" in warning
