"""Two expert layouts in memory, one on disk: all loads clean, computes the same, and saves under the hub's names.

Every way to get a model ends in the same bytes: fresh from a config, loaded from the hub layout, from the fused
layout, or from the names of hpcai-tech/grok-1 and keyfan/grok-1-hf.
"""

import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from grok1.conversion.names import hub_tensors
from modeling_grok1 import Grok1ForCausalLM, Grok1Model, GrokConfig


# Auto class: the parameters that a checkpoint of the language model does not have.
AUTO_CLASSES = {
    AutoModel: set(),
    AutoModelForCausalLM: set(),
    AutoModelForSequenceClassification: {"score.weight"},
    AutoModelForTokenClassification: {"score.weight", "score.bias"},
    AutoModelForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
}
CLEAN = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
LAYOUTS = ("fused", "linear")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

each_auto_class = pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda c: c.__name__)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def assert_same_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def expected_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Norms and routers are float32 in every precision."""
    return torch.float32 if "norm." in name or "block_sparse_moe.gate." in name else dtype


@torch.no_grad()
def outputs(model, tokens):
    output = model(tokens)
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


@each_auto_class
@each_dtype
def test_every_class_loads_clean_in_both_layouts(converted, auto_class, dtype):
    tokens = torch.arange(3, 19)[None]
    folder, found = converted("tiny-1", dtype), {}
    for layout in LAYOUTS:
        model, info = auto_class.from_pretrained(
            folder, dtype=DTYPES[dtype], experts_layout=layout, output_loading_info=True
        )
        assert info == {**CLEAN, "missing_keys": AUTO_CLASSES[auto_class]}
        assert model.experts_layout == layout
        for name, parameter in model.named_parameters():
            assert parameter.dtype == expected_dtype(name, DTYPES[dtype]), name
        for name, buffer in model.named_buffers():
            assert buffer.dtype == torch.float32, name
        base = model.base_model
        assert not any(parameter.is_meta for parameter in model.parameters())
        found[layout] = outputs(base, tokens)
    assert found["fused"].dtype == DTYPES[dtype]
    if dtype == "float32":
        assert (found["fused"] - found["linear"]).abs().max() <= 1e-5
    else:
        assert torch.equal(found["fused"], found["linear"])


def test_the_norm_and_router_patterns_match_nothing_else(small_config):
    """Unanchored, "gate" would hold `gate_up_proj` in float32 too: twice the memory, and no warning."""
    for options in ({}, {"experts_layout": "linear"}):
        model = Grok1ForCausalLM._from_config(small_config, dtype=torch.bfloat16, **options)
        kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
        assert kept == {name for name, _ in model.named_parameters() if expected_dtype(name, None) == torch.float32}
        assert len(kept) == 5 * small_config.num_hidden_layers + 1


@each_dtype
@each_layout
def test_a_loaded_model_saves_the_converted_bytes(converted, tmp_path, dtype, layout, read_tensors):
    folder = converted("tiny-1", dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout)
    assert model.dtype == DTYPES[dtype]  # the folder's, unless asked otherwise
    model.save_pretrained(tmp_path)
    written = read_tensors(tmp_path)
    assert_same_tensors(written, read_tensors(folder))
    assert written.keys() == hub_tensors(model.config).keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, in memory

    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    assert config == original


@pytest.mark.parametrize("names", ["hpcai", "keyfan"])
@each_layout
@each_dtype
def test_other_repositories_names_are_read_and_ours_written(
    converted, aliased, tmp_path, names, layout, dtype, read_tensors
):
    folder = aliased("tiny-1", dtype, names)
    assert not set(read_tensors(folder)) & {"model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"}
    expected = read_tensors(converted("tiny-1", dtype))
    model, info = AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout, output_loading_info=True)
    assert info == CLEAN
    model.save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), expected)


@pytest.mark.parametrize("names", ["hpcai", "keyfan"])
@each_auto_class
def test_every_class_reads_other_repositories_names(converted, aliased, auto_class, names):
    tokens = torch.arange(3, 19)[None]
    expected = outputs(Grok1Model.from_pretrained(converted("tiny-1", "float32")), tokens)
    for layout in LAYOUTS:
        model, info = auto_class.from_pretrained(
            aliased("tiny-1", "float32", names), experts_layout=layout, output_loading_info=True
        )
        assert info == {**CLEAN, "missing_keys": AUTO_CLASSES[auto_class]}
        assert (outputs(model.base_model, tokens) - expected).abs().max() <= 1e-5


@each_layout
def test_a_fresh_model_saves_the_hubs_names_and_comes_back(small_config, tmp_path, layout, read_tensors):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config, experts_layout=layout).eval()
    model.save_pretrained(tmp_path / "first")
    written = read_tensors(tmp_path / "first")
    table = hub_tensors(small_config, dtype="float32")
    assert {name: (tuple(t.shape), t.dtype) for name, t in written.items()} == {
        name: (tensor.shape, torch.float32) for name, tensor in table.items()
    }
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])

    tokens = torch.arange(3, 19)[None]
    for other in LAYOUTS:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "first", experts_layout=other, output_loading_info=True
        )
        assert info == CLEAN
        assert (outputs(loaded, tokens) - outputs(model, tokens)).abs().max() <= 1e-5
        loaded.save_pretrained(tmp_path / other)
        assert_same_tensors(read_tensors(tmp_path / other), written)


def test_models_of_both_layouts_may_share_a_config(small_config, tmp_path, read_tensors):
    def saved_names(model):
        model.save_pretrained(tmp_path)
        return read_tensors(tmp_path).keys()

    hub = hub_tensors(small_config).keys()
    fused = Grok1ForCausalLM(small_config)
    linear = Grok1ForCausalLM(small_config, experts_layout="linear")
    assert small_config.model_type == "grok-1"
    assert linear.model.config is linear.config
    assert saved_names(fused) == saved_names(linear) == hub

    again = Grok1ForCausalLM(linear.config)
    assert (fused.experts_layout, linear.experts_layout, again.experts_layout) == ("fused", "linear", "fused")
    assert saved_names(again) == saved_names(linear) == hub


def test_a_fused_checkpoint_loads_and_saves_the_hubs_names(converted, tmp_path, read_tensors):
    folder = converted("tiny-1", "float32")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = read_tensors(tmp_path / "fused").keys()
    assert names == hub_tensors(model.config, "fused").keys()

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert info == CLEAN
    loaded.save_pretrained(tmp_path / "hub")
    assert_same_tensors(read_tensors(tmp_path / "hub"), read_tensors(folder))


@each_auto_class
def test_a_fused_checkpoint_is_refused_by_linear_experts(converted, tmp_path, auto_class):
    """Transformers would only report unexpected and missing names, and load with random experts."""
    AutoModelForCausalLM.from_pretrained(converted("tiny-1", "float32")).save_pretrained(
        tmp_path, save_original_format=False
    )
    with pytest.raises(ValueError, match=r"experts_layout='linear'.*holds fused experts.*experts_layout='fused'"):
        auto_class.from_pretrained(tmp_path, experts_layout="linear")


@each_layout
def test_sharded_saves_hold_the_same(converted, tmp_path, layout, read_tensors):
    folder = converted("tiny-1", "float32")
    AutoModelForCausalLM.from_pretrained(folder, experts_layout=layout).save_pretrained(
        tmp_path, max_shard_size="200KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_tensors(read_tensors(tmp_path), read_tensors(folder))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_tensors(folder).keys()
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN


@each_auto_class
@each_layout
def test_every_class_saves_and_loads_itself(converted, tmp_path, auto_class, layout, read_tensors):
    model = auto_class.from_pretrained(converted("tiny-1", "float32"), experts_layout=layout)
    model.save_pretrained(tmp_path)
    again, info = auto_class.from_pretrained(tmp_path, experts_layout=layout, output_loading_info=True)
    assert info == CLEAN
    assert_same_tensors(again.state_dict(), model.state_dict())
    experts = [name for name in read_tensors(tmp_path) if "experts" in name]
    assert all(name.endswith((".w1.weight", ".w2.weight", ".w3.weight")) for name in experts)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "grok-1"
    file = type(model).__module__.rpartition(".")[2]
    assert config["auto_map"][auto_class.__name__] == f"{file}.{type(model).__name__}"
    assert (tmp_path / f"{file}.py").is_file()


def test_a_base_model_becomes_a_language_model(converted, tmp_path):
    folder = converted("tiny-1", "float32")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN  # the head is the embedding
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_tensors(model.state_dict(), whole.state_dict())


def test_an_untied_head_stays_untied(small_config, tmp_path, read_tensors):
    small_config.tie_word_embeddings = False
    model = Grok1ForCausalLM(small_config)
    model.save_pretrained(tmp_path)
    written = read_tensors(tmp_path)
    assert not torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == CLEAN
    assert_same_tensors(again.state_dict(), model.state_dict())


def test_loading_options_are_checked(converted, small_config):
    folder = converted("tiny-1", "float32")
    for auto_class in AUTO_CLASSES:
        with pytest.raises(TypeError, match="experts_layuot"):
            auto_class.from_pretrained(folder, experts_layuot="linear")
        with pytest.raises(TypeError, match="experts_layuot"):
            auto_class.from_config(small_config, experts_layuot="linear")
        with pytest.raises(ValueError, match=r"`experts_layout`: expected 'fused' or 'linear', found 'flat'"):
            auto_class.from_pretrained(folder, experts_layout="flat")


def test_a_config_of_the_linear_layout_serialises_as_grok_1(small_config):
    linear = Grok1ForCausalLM(small_config, experts_layout="linear")
    assert linear.config.to_dict()["model_type"] == GrokConfig.model_type == "grok-1"
    assert "linear" not in json.dumps(linear.config.to_dict())
