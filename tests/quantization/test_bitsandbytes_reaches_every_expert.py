"""bitsandbytes, passed the ordinary way, quantises every projection and every expert, and nothing else."""

import logging
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
)

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


AUTO_CLASSES = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]
# What is passed, and the most bytes a parameter that it may cost.
METHODS = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.60),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, 0.60),
    "nf4-double": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, 0.60),
    "int8": ({"load_in_8bit": True}, 1.10),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the hub layout, with matrices large enough that scales weigh what they weigh at full size."""
    config = GrokConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=4,
        max_position_embeddings=128,
        attn_output_multiplier=64**-0.5,
        embedding_multiplier_scale=128**0.5,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("hub")
    Grok1ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)
    return out


def matrices(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(weights, bytes with all quantisation state) of every projection of attention and experts, from its tensors."""
    found = {}
    for name, module in model.named_modules():
        if not name.endswith(("_proj", ".w1", ".w2", ".w3")):
            continue
        weight = module.weight
        state: list[torch.Tensor] = []
        count = weight.numel()
        if isinstance(weight, bnb.nn.Params4bit):
            state = [t for t in weight.quant_state.as_dict(packed=True).values() if isinstance(t, torch.Tensor)]
            count = weight.quant_state.shape.numel()
        elif isinstance(weight, bnb.nn.Int8Params):
            state = [weight.SCB]
        found[name] = (count, weight.nbytes + sum(tensor.nbytes for tensor in state))
    return found


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_footprint_over_all_matrices(folder: Path, method: str, auto_class: type) -> None:
    options, limit = METHODS[method]
    model = auto_class.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**options))
    config = model.config
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    experts = config.num_experts * 3 * config.hidden_size * config.intermediate_size

    found = matrices(model)
    assert len(found) == config.num_hidden_layers * (4 + 3 * config.num_experts)
    assert sum(count for count, _ in found.values()) == config.num_hidden_layers * (attention + experts)
    assert sum(size for _, size in found.values()) <= limit * config.num_hidden_layers * (attention + experts)

    for name, weight in model.named_parameters():
        if name.endswith(("norm.weight", "gate.weight")):
            assert weight.dtype == torch.float32, name
        elif any(part in name for part in ("embed_tokens", "lm_head", "score", "qa_outputs")):
            assert weight.dtype == torch.bfloat16 and type(weight) is nn.Parameter, name
        else:
            assert weight.dtype == (torch.int8 if method == "int8" else torch.uint8), name
    assert torch.isfinite(model(torch.tensor([[5, 7, 11]]))[0]).all()


@pytest.mark.parametrize("method", METHODS)
def test_every_matrix_is_its_own_in_the_hub_file_rounded(folder: Path, method: str) -> None:
    """No matrix is random, swapped with another, or left out: each is nearest to the tensor of its name."""
    options = BitsAndBytesConfig(**METHODS[method][0])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options).dequantize()
    on_disk = load_file(folder / "model.safetensors")
    limit = 0.01 if method == "int8" else 0.16
    compared = 0
    for name, weight in model.named_parameters():
        error = (weight.float() - on_disk[name].float()).norm() / on_disk[name].float().norm()
        assert error <= (limit if "_proj" in name or ".experts." in name else 0), name
        compared += error > 0
    assert compared == 2 * (4 + 4 * 3)


def test_a_skip_list_of_the_users_does_not_quantise_the_head(folder: Path) -> None:
    """Transformers drops its own list, which has the tied head in it, where the user gives one."""
    options = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["self_attn"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=options)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options",
    [{"load_in_4bit": True}, {"load_in_8bit": True}],
    ids=["4bit", "8bit"],
)
def test_skipped_experts_are_warned_about(folder: Path, options: dict, caplog: pytest.LogCaptureFixture) -> None:
    skip = [r"model\.layers\.\d+\.block_sparse_moe\.experts\.[01]"]
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(**options, llm_int8_skip_modules=skip)
        )
    (warning,) = [r.getMessage() for r in caplog.records if "expert matrices" in r.getMessage()]
    assert "left 12 of 24 expert matrices in torch.bfloat16" in warning
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight is the first" in warning
    assert "Grok1Int8Config()" in warning


def test_nothing_is_warned_about_where_all_experts_are_quantised(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert "expert matrices" not in caplog.text


def test_fused_experts_are_refused(folder: Path) -> None:
    """bitsandbytes would skip the 3-D parameters silently."""
    with pytest.raises(ValueError, match=r"'bitsandbytes' is not known to reach Grok-1's experts.*layout 'fused'"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), experts_layout="fused"
        )


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4bit", "8bit"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_device_map_with_cpu_or_disk_beside_another_device_is_refused(
    folder: Path, tmp_path: Path, options: dict, place: str
) -> None:
    device_map = {"model": 0, "model.layers.1": place, "lm_head": 0}
    with pytest.raises(ValueError, match="enough GPU RAM to fit the quantized model"):
        AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**options),
            device_map=device_map,
            offload_folder=tmp_path,
        )
