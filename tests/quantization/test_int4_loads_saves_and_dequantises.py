"""Int4 through every Auto class, both layouts, on disk, offloaded, compiled and under adapters: one set of weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_folders import tensors
from small_grok import prompt, save_small_grok
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.distributed import DistributedConfig

from modeling_grok1 import Grok1ForCausalLM, Grok1Int4Config, Grok1Int8Config
from modeling_grok1.packing_grok1 import quantise_int4, unpack
from modeling_grok1.quantization_grok1 import Grok1Quantizer
from modeling_grok1.quantized_grok1 import QuantizedExperts, QuantizedLinear


LAYOUTS = ["fused", "linear"]
# Blocks of 128 inputs, as in the demo checkpoint.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return save_small_grok(tmp_path_factory.mktemp("floats"), torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def folders(floats, tmp_path_factory):
    """Folders by name: int8, and int4 with groups of 32 quantised from the floats."""
    configs = {"int8": Grok1Int8Config(scale_blocks=2), "int4": Grok1Int4Config(group_size=32)}
    found = {"floats": floats}
    for name, config in configs.items():
        found[name] = tmp_path_factory.mktemp(name)
        load(floats, quantization_config=config).save_pretrained(found[name])
    return found


def load(folder, layout="fused", auto_class=AutoModelForCausalLM, dtype=torch.float32, **kwargs):
    return auto_class.from_pretrained(folder, experts_layout=layout, dtype=dtype, **kwargs)


@torch.no_grad()
def logits(model, ids=None):
    return model(prompt(12) if ids is None else ids).logits


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def test_the_folder_holds_packed_values_scales_and_shapes(folders, floats):
    found, source = tensors(folders["int4"]), tensors(floats)
    quantised = {name.removesuffix("_packed") for name in found if name.endswith("_packed")}
    assert len(quantised) == 2 * (4 + 8 * 3)
    for name in sorted(quantised):
        values, scale = quantise_int4(source[name].float(), 32)
        assert torch.equal(unpack(found[f"{name}_packed"], 4), values)
        assert torch.equal(found[f"{name}_scale"], scale)
        assert found[f"{name}_shape"].tolist() == list(source[name].shape)
    rest = {name: value for name, value in found.items() if not name.endswith(("_packed", "_scale", "_shape"))}
    assert rest.keys() == source.keys() - quantised - {"lm_head.weight"}
    config = json.loads((folders["int4"] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }


@pytest.mark.parametrize(
    "auto_class",
    [
        *(AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering),
        *(AutoModelForSequenceClassification, AutoModelForTokenClassification, Grok1ForCausalLM),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_every_auto_class_loads_every_weight(folders, auto_class, layout, precision):
    model, info = load(folders[precision], layout, auto_class, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith(("score.", "qa_outputs.")) for name in info["missing_keys"])
    quantised = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedExperts)]
    assert len(quantised) == 2 * (5 if layout == "fused" else 4 + 24)
    assert {module.bits for module in quantised} == {8 if precision == "int8" else 4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_saved_again_it_is_the_same_folder_in_either_layout(folders, tmp_path, layout, precision):
    model = load(folders[precision], layout)
    model.save_pretrained(tmp_path)
    assert_equal(tensors(tmp_path), tensors(folders[precision]))
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "compressed-tensors"
    other = load(tmp_path, "linear" if layout == "fused" else "fused")
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_dequantised_it_computes_the_same_and_saves_an_ordinary_folder(folders, tmp_path, layout, precision):
    model = load(folders[precision], layout, dtype=torch.float64)
    before = logits(model)
    model.dequantize()
    assert not any(isinstance(m, QuantizedLinear | QuantizedExperts) for m in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path, dtype=torch.float64)), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_int8_folder_becomes_int4_while_it_loads(folders, tmp_path, layout):
    model = load(folders["int8"], layout, quantization_config=Grok1Int4Config(group_size=64))
    model.save_pretrained(tmp_path)
    plain = load(folders["int8"], dtype=torch.float32)
    plain.dequantize()
    found = tensors(tmp_path)
    expected = plain.model.layers[1].self_attn.o_proj.weight
    values, scale = quantise_int4(expected.detach(), 64)
    assert torch.equal(unpack(found["model.layers.1.self_attn.o_proj.weight_packed"], 4), values)
    assert torch.equal(found["model.layers.1.self_attn.o_proj.weight_scale"], scale)
    values, scale = quantise_int4(plain.model.layers[1].block_sparse_moe.experts.gate_up_proj[3, :256].detach(), 64)
    assert torch.equal(unpack(found["model.layers.1.block_sparse_moe.experts.3.w1.weight_packed"], 4), values)
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_on_reads_the_packed_bytes(folders, place, precision, dtype):
    whole = load(folders[precision], "linear", dtype=dtype)
    model = load(folders[precision], None, dtype=dtype, experts_on=place, expert_cache="200KB")
    for ids in (prompt(12), prompt(1)):
        assert torch.equal(logits(model, ids), logits(whole, ids))
    model = load(folders[precision], None, dtype=dtype, experts_on=place)
    logits(model, prompt(1))
    bits = 8 if precision == "int8" else 4
    group = 128 if precision == "int8" else 32
    matrices = 3 * 128 * 256
    assert model.expert_store.bytes_fetched == 2 * 2 * (matrices * bits // 8 + matrices // group * 2)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_layers_on_disk_give_the_same_logits(folders, tmp_path, precision):
    whole = load(folders[precision])
    device_map = {
        **dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu"),
        **{f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(2)},
    }
    for layout in LAYOUTS:
        model = load(folders[precision], layout, device_map=device_map, offload_folder=tmp_path / layout)
        assert all(value.device.type == "meta" for value in model.model.layers[1].parameters())
        torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=1e-5)


def test_the_code_in_the_folder_does_it_without_the_package(folders):
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True);"
        f"models = [load({str(folders['int4'])!r}), load({str(folders['int8'])!r})];"
        "assert {type(model.hf_quantizer).__name__ for model in models} == {'Grok1Quantizer'};"
        "assert all(torch.isfinite(model(torch.arange(3, 20)[None]).logits).all() for model in models);"
        "assert 'modeling_grok1' not in sys.modules and 'compressed_tensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folders["int4"].parent)


def test_groups_that_do_not_fit_are_refused_with_what_would_do(floats):
    with pytest.raises(
        ValueError, match=r"`group_size`: expected a divisor of hidden_size \(128\), found 256; 128 or"
    ):
        load(floats, quantization_config=Grok1Int4Config(group_size=256))
    for size in (0, 12, True, 32.0):
        with pytest.raises(ValueError, match="`group_size`: expected a positive multiple of 8"):
            Grok1Int4Config(group_size=size)


def preprocess(config, quantization, **distributed):
    config.quantization_config = quantization
    config.distributed_config = DistributedConfig(**distributed)
    with torch.device("meta"):
        model = Grok1ForCausalLM(config)
    Grok1Quantizer(quantization, pre_quantized=True).preprocess_model(model)
    return model


def test_groups_that_ranks_would_cut_are_refused_by_name(floats):
    config = AutoConfig.from_pretrained(floats)
    model = preprocess(config, Grok1Int4Config(group_size=128), tp_size=2)
    key = "model.layers.*.block_sparse_moe.experts.down_proj"
    assert model.tp_plan[f"{key}_scale"] == model.tp_plan[key]
    with pytest.raises(ValueError, match=r"`tp_size`: expected a divisor of the 2 scale blocks of o_proj .* found 4"):
        preprocess(config, Grok1Int4Config(group_size=128), tp_size=4)


def test_compiled_it_is_one_graph_with_the_same_logits(folders):
    model = load(folders["int4"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (12, 1):
        torch.testing.assert_close(logits(compiled, prompt(length)), logits(model, prompt(length)), rtol=0, atol=1e-4)


def test_adapters_get_the_gradients_that_they_get_over_floats(folders):
    peft = pytest.importorskip("peft")
    gradients = []
    for dequantised in (False, True):
        model = load(folders["int4"], "linear")
        if dequantised:
            model.dequantize()
        torch.manual_seed(0)
        options = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "w1", "w2", "w3"], init_lora_weights=False)
        model = peft.get_peft_model(model, options)
        model(prompt(12), labels=prompt(12)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    actual, expected = gradients
    assert sum(gradient is not None for gradient in expected.values()) > 20
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None
        else:
            assert (actual[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-9, name


def test_the_format_that_was_given_up_is_refused_with_the_command_that_rewrites_it(folders, tmp_path):
    for file in Path(folders["int8"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "grok1_int8", "scale_blocks": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto_class in (AutoModelForCausalLM, Grok1ForCausalLM):
        with pytest.raises(ValueError, match="grok1 convert SRC OUT --dtype int8"):
            auto_class.from_pretrained(tmp_path)
