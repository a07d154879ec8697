"""A quantisation that is not known to reach the experts is refused, with what to use instead; these tests need none of
the quantisation libraries."""

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.activations import ACT2FN
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.loading_grok1 import quantized_experts_layout


REACHES = {
    "bitsandbytes_4bit": "linear",
    "bitsandbytes_8bit": "linear",
    "torchao": "linear",
    "fp8": None,
    "grok1_int8": None,
    "grok1_int4": None,
}
NAMES = {"bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"}


def config_with(config: GrokConfig, method: str) -> GrokConfig:
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": NAMES.get(method, method)}
    return config


@pytest.mark.parametrize("method", sorted(AUTO_QUANTIZATION_CONFIG_MAPPING))
def test_every_method_of_transformers_has_an_answer(small_config: GrokConfig, method: str) -> None:
    config = config_with(small_config, method)
    if method in REACHES:
        assert quantized_experts_layout(config, None) == REACHES[method]
        return
    with pytest.raises(ValueError, match="not known to reach Grok-1's experts") as refusal:
        Grok1ForCausalLM(config)
    assert repr(method) in str(refusal.value)
    assert "BitsAndBytesConfig(load_in_4bit=True)" in str(refusal.value)
    # A method that replaces nn.Linear finds the experts there; loading then says what it did not reach.
    assert Grok1ForCausalLM(config, experts_layout="linear").experts_layout == "linear"


@pytest.mark.parametrize(("method", "layout"), [("bitsandbytes_8bit", "fused"), ("fp8", "linear")])
def test_a_layout_that_the_method_does_not_read_is_refused(small_config: GrokConfig, method: str, layout: str) -> None:
    with pytest.raises(ValueError, match=f"in the layout '{layout}'"):
        Grok1ForCausalLM(config_with(small_config, method), experts_layout=layout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = GrokConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=2,
        max_position_embeddings=128,
        attn_output_multiplier=32**-0.5,
    )
    torch.manual_seed(0)
    Grok1ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_fine_grained_fp8_without_a_gpu_is_refused(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="A GPU or XPU is needed for FP8 quantization"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config())


def test_fine_grained_fp8_quantises_the_experts(folder: Path) -> None:
    """Its products need a GPU, its weights do not: blocks of 128 x 128 with a scale each, the right activation."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config())
    experts, originals = (m.model.layers[0].block_sparse_moe.experts for m in (model, plain))
    assert type(experts.act_fn) is type(ACT2FN["gelu_pytorch_tanh"])
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
        assert weight.dtype == torch.float8_e4m3fn
        E, N, K = weight.shape  # noqa: N806
        values = weight.float().view(E, N // 128, 128, K // 128, 128) * scale[:, :, None, :, None]
        original = getattr(originals, name).float()
        assert (values.view(E, N, K) - original).norm() < 0.05 * original.norm()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32


@pytest.mark.gpu
def test_fine_grained_fp8_runs_on_a_gpu(folder: Path) -> None:
    pytest.importorskip("kernels")
    tokens = torch.tensor([[5, 7, 11, 13]], device="cuda")
    plain = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(), device_map="cuda")
    with torch.no_grad():
        expected, found = plain(tokens).logits.float(), model(tokens).logits.float()
    assert (found - expected).norm() < 0.2 * expected.norm()
