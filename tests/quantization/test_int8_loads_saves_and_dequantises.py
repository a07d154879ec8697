"""Int8 through every Auto class, in memory, on disk and offloaded: the same bits; and the way back to floats."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.accelerate import compute_module_sizes

from modeling_grok1 import Grok1ForCausalLM, Grok1Int8Config
from modeling_grok1.modeling_grok1 import Grok1Experts, Grok1LinearExperts
from modeling_grok1.quantization_grok1 import Grok1Quantizer
from modeling_grok1.quantized_grok1 import QuantizedExperts, QuantizedLinear


LAYOUTS = ["fused", "linear"]
AUTO_CLASSES = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]


def load(folder, layout="fused", auto_class=AutoModelForCausalLM, **kwargs):
    return auto_class.from_pretrained(folder, experts_layout=layout, **kwargs)


def tensors(folder):
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


@torch.no_grad()
def logits(model, golden):
    return model(golden.tokens, attention_mask=golden.attention_mask).logits


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_auto_class_quantises_every_projection_and_nothing_else(converted, auto_class, layout):
    expected = {
        name.removeprefix("model."): value
        for name, value in load(converted("tiny-8", "int8"), layout).named_parameters()
        if "layers." in name
    }
    model, info = load(converted("tiny-8", "int8"), layout, auto_class, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(("score.", "qa_outputs.")) for name in info["missing_keys"])
    layers = {name.removeprefix("model."): value for name, value in model.named_parameters() if "layers." in name}
    assert_equal(layers, expected)
    for name, value in model.named_parameters():
        if name.endswith("_scale"):
            assert value.dtype == torch.bfloat16
        elif "_proj" in name or ".experts." in name:
            assert value.dtype == torch.int8
        else:
            assert value.dtype == (torch.float32 if "norm" in name or "gate" in name else torch.bfloat16)
        assert not value.requires_grad or not ("_proj" in name or ".experts." in name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
def test_saved_folders_are_int8_hub_folders_again(converted, tmp_path, name, layout):
    model = load(converted(name, "int8"), layout, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert_equal(tensors(tmp_path), tensors(converted(name, "int8")))
    assert "lm_head.weight" not in tensors(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert config["ignore"] == ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    again = load(tmp_path, layout, dtype=torch.float32)
    assert_equal(dict(again.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dequantised_models_are_plain_and_save_as_ordinary_folders(converted, reference, tmp_path, layout):
    golden = reference("tiny-8", "fp32")
    # In float64, where the order of a sum does not show: in float32 it depends on the processor.
    model = load(converted("tiny-8", "int8"), layout, dtype=torch.float64)
    before = logits(model, golden)
    model.dequantize()
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    plain = {"fused": Grok1Experts, "linear": Grok1LinearExperts}[layout]
    assert type(model.model.layers[0].block_sparse_moe.experts) is plain
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float64
    torch.testing.assert_close(logits(model, golden), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    saved = {name: value.float() for name, value in tensors(tmp_path).items()}
    assert_equal(saved, tensors(converted("tiny-8", "float32")))


def test_dequantising_in_bf16_gives_the_bf16_conversion(converted):
    model = load(converted("tiny-8", "int8"))
    model.dequantize()
    plain = load(converted("tiny-8", "bfloat16"))
    assert_equal(dict(model.named_parameters()), dict(plain.named_parameters()))


def test_dequantising_to_another_dtype_is_refused(converted):
    model = load(converted("tiny-1", "int8"))
    with pytest.raises(ValueError, match=r"dequantize.*torch.bfloat16.*torch.float32.*dtype=torch.float32"):
        model.dequantize(torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantising_on_the_fly_and_saving(converted, tmp_path, dtype, layout):
    """A float32 conversion gives back xAI's bits; a bfloat16 one all but those of the scales with significand 1.5."""
    quantised = load(
        converted("tiny-8", dtype),
        layout,
        dtype=getattr(torch, dtype),
        quantization_config=Grok1Int8Config(scale_blocks=8),
    )
    ours, xai = (
        {name: value for name, value in model.named_parameters() if value.dtype == torch.int8}
        for model in (quantised, load(converted("tiny-8", "int8"), layout))
    )
    assert ours.keys() == xai.keys()
    different = sum((ours[name] != value).sum().item() for name, value in xai.items())
    assert different <= (0 if dtype == "float32" else 0.01 * sum(value.numel() for value in xai.values()))
    assert all((ours[name].int() - value.int()).abs().max() <= 1 for name, value in xai.items())
    quantised.save_pretrained(tmp_path)
    assert tensors(tmp_path).keys() == tensors(converted("tiny-8", "int8")).keys()
    again = load(tmp_path, layout, dtype=getattr(torch, dtype))
    assert_equal(dict(again.named_parameters()), dict(quantised.named_parameters()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_on_disk_give_the_same_logits(converted, reference, tmp_path, layout):
    golden = reference("tiny-8", "fp32")
    whole = load(converted("tiny-8", "int8"), layout, dtype=torch.float32)
    device_map = {
        **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
        **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(whole.config.num_hidden_layers)},
    }
    model = load(
        converted("tiny-8", "int8"), layout, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert all(value.device.type == "meta" for value in model.model.layers[1].parameters())
    assert torch.equal(logits(model, golden), logits(whole, golden))
    with pytest.raises(ValueError, match="offloaded or sharded"):
        model.dequantize()


def test_placement_counts_one_byte_a_weight_and_two_a_scale(small_config):
    sizes = {}
    for pre_quantized in (True, False):
        small_config.quantization_config = Grok1Int8Config(scale_blocks=4)
        with torch.device("meta"):
            model = Grok1ForCausalLM(small_config).to(torch.bfloat16)
        quantizer = Grok1Quantizer(small_config.quantization_config, pre_quantized=pre_quantized)
        quantizer.preprocess_model(model)
        sizes[pre_quantized], _ = compute_module_sizes(model, quantizer)
    experts = "model.layers.0.block_sparse_moe.experts"
    E, D, hidden = small_config.num_experts, small_config.hidden_size, small_config.intermediate_size  # noqa: N806
    assert sizes[True] == sizes[False]
    assert sizes[True][experts] == E * (3 * hidden * D) + 2 * E * (2 * hidden + 4 * D)
    assert sizes[True]["model.layers.0.self_attn.o_proj"] == D * 32 + 2 * 4 * D


def preprocess(config, blocks, **distributed):
    config.quantization_config = Grok1Int8Config(scale_blocks=blocks)
    if distributed:
        config.distributed_config = DistributedConfig(**distributed)
    with torch.device("meta"):
        model = Grok1ForCausalLM(config)
    Grok1Quantizer(config.quantization_config, pre_quantized=True).preprocess_model(model)
    return model


def test_scales_are_sharded_beside_their_weights(small_config):
    model = preprocess(small_config, 4)
    tp, ep = model.tp_plan, model.ep_plan
    for plan in (tp, ep):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.*.block_sparse_moe.experts.{name}"
            assert plan[f"{key}_scale"] == plan[key]


def test_ranks_that_would_split_a_scale_block_are_refused_by_name(small_config):
    preprocess(small_config, 4, tp_size=2)
    with pytest.raises(ValueError, match=r"`tp_size`: expected a divisor of the 1 scale blocks .* found 2"):
        preprocess(small_config, 1, tp_size=2)


def test_blocks_that_do_not_divide_the_inputs_are_refused_with_every_reason(small_config):
    with pytest.raises(ValueError, match=r"num_attention_heads \* head_dim \(32\), found 5.*intermediate_size \(48\)"):
        preprocess(small_config, 5)


@pytest.mark.parametrize("blocks", [0, -1, 2.0, "8", True, None])
def test_a_scale_blocks_that_is_no_positive_integer_is_refused(blocks):
    with pytest.raises(ValueError, match="scale_blocks"):
        Grok1Int8Config(scale_blocks=blocks)


def test_a_config_of_another_method_is_refused():
    with pytest.raises(ValueError, match="grok1_int8"):
        Grok1Int8Config(quant_method="fp8")


def test_what_lies_around_int8_weights_can_be_trained(converted, reference):
    golden = reference("tiny-8", "fp32")
    gradients = {}
    for dtype in ("int8", "float32"):
        for layout in LAYOUTS:
            model = load(converted("tiny-8", dtype), layout, dtype=torch.float32)
            model(golden.tokens, attention_mask=golden.attention_mask, labels=golden.tokens).loss.backward()
            gradients[dtype, layout] = {
                name: value.grad for name, value in model.named_parameters() if "norm" in name or "embed" in name
            }
    for layout in LAYOUTS:
        for name, expected in gradients["float32", layout].items():
            actual = gradients["int8", layout][name]
            assert (actual - expected).norm() <= 1e-3 * expected.norm(), name


def test_the_modules_are_int8(converted):
    model = load(converted("tiny-8", "int8"))
    layer = model.model.layers[0]
    assert type(layer.block_sparse_moe.experts) is QuantizedExperts
    assert repr(layer.self_attn.o_proj) == "QuantizedLinear(in_features=128, out_features=32, bits=8)"
    assert layer.self_attn.o_proj.weight_scale.shape == (32, 8)
    assert isinstance(layer.self_attn.o_proj, QuantizedLinear)
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_the_numbers_without_their_scales_is_refused(converted, layout):
    with pytest.raises(ValueError, match=r"holds quantised weights with scales .* leave `quantization_config=None`"):
        AutoModelForCausalLM.from_pretrained(
            converted("tiny-8", "int8"), quantization_config=None, experts_layout=layout
        )
