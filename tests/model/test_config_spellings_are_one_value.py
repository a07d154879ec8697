"""Four fields, and theta, have two spellings: one value each, however it is given; contradictions are refused."""

import copy
import json
import pickle

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_grok1 import GrokConfig


# (field, its twin, a value, another value)
TWINS = [
    ("num_experts", "num_local_experts", 4, 6),
    ("attn_logit_softcapping", "max_attn_value", 20.0, 25.0),
    ("intermediate_size", "moe_intermediate_size", 64, 128),
    ("output_multiplier_scale", "logit_scale", 0.5, 0.25),
]
each_twin = pytest.mark.parametrize(("field", "twin", "value", "other"), TWINS)


@pytest.fixture
def folder(tmp_path):
    GrokConfig().save_pretrained(tmp_path)
    return tmp_path


def both(config, field, twin):
    written = config.to_dict()
    return getattr(config, field), getattr(config, twin), written[field], written[twin]


@each_twin
def test_either_spelling_sets_both(field, twin, value, other):
    for given in ({field: value}, {twin: value}, {field: value, twin: value}):
        assert both(GrokConfig(**given), field, twin) == (value,) * 4


@each_twin
def test_setting_either_attribute_sets_both(field, twin, value, other):
    config = GrokConfig()
    setattr(config, twin, value)
    assert both(config, field, twin) == (value,) * 4
    setattr(config, field, other)
    assert both(config, field, twin) == (other,) * 4
    assert both(copy.deepcopy(config), field, twin) == both(pickle.loads(pickle.dumps(config)), field, twin)


@each_twin
def test_an_override_of_either_spelling_replaces_both_of_the_file(folder, field, twin, value, other):
    for given in ({field: value}, {twin: value}):
        for auto in (GrokConfig, AutoConfig):
            assert both(auto.from_pretrained(folder, **given), field, twin) == (value,) * 4


@each_twin
def test_a_contradiction_is_refused_in_a_call(field, twin, value, other):
    with pytest.raises(ValueError, match=rf"`{field}` is {value} and `{twin}` is {other}"):
        GrokConfig(**{field: value, twin: other})


@each_twin
def test_a_contradiction_is_refused_in_a_file(folder, field, twin, value, other):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value, twin: other}))
    for auto in (GrokConfig, AutoConfig):
        with pytest.raises(ValueError, match=rf"`{field}` is {value} and `{twin}` is {other}"):
            auto.from_pretrained(folder)
    # An override settles it.
    assert both(GrokConfig.from_pretrained(folder, **{field: value}), field, twin) == (value,) * 4


@each_twin
def test_a_contradiction_is_refused_in_overrides(folder, field, twin, value, other):
    for auto in (GrokConfig, AutoConfig):
        with pytest.raises(ValueError, match=rf"`{field}` is {value} and `{twin}` is {other}"):
            auto.from_pretrained(folder, **{field: value, twin: other})


def test_all_contradictions_are_named_at_once():
    with pytest.raises(ValueError, match=r"num_local_experts.*max_attn_value.*rope_theta"):
        GrokConfig(
            num_experts=4,
            num_local_experts=8,
            attn_logit_softcapping=1.0,
            max_attn_value=2.0,
            rope_theta=1e5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )


def test_theta_is_read_at_the_top_level_and_below_rope_parameters(folder):
    for given in ({"rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}):
        for config in (GrokConfig(**given), GrokConfig.from_pretrained(folder, **given)):
            assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
            assert config.to_dict()["rope_theta"] == 500.0


def test_a_rope_type_at_the_top_level_is_moved_below_rope_parameters(folder):
    assert "rope_type" not in GrokConfig(rope_type="default").to_dict()
    config = GrokConfig.from_pretrained(folder, rope_type="dynamic", rope_parameters={"factor": 2.0})
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match=r"`rope_parameters.rope_type` is default and `rope_type` is yarn"):
        GrokConfig(rope_type="yarn", rope_parameters={"rope_type": "default"})


def test_a_model_loaded_with_an_override_is_consistent(converted):
    """The file has 8 experts: with 4, the sizes differ from the weights, and every spelling says 4."""
    folder = converted("tiny-1", "float32")
    for given in ({"num_experts": 4}, {"num_local_experts": 4}):
        model = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, **given)
        assert both(model.config, "num_experts", "num_local_experts") == (4,) * 4
        assert model.model.layers[0].block_sparse_moe.gate.weight.shape[0] == 4
        assert model.model.layers[0].block_sparse_moe.experts.gate_up_proj.shape[0] == 4
    with pytest.raises(ValueError, match="two spellings of one value disagree"):
        AutoModelForCausalLM.from_pretrained(folder, num_experts=4, num_local_experts=8)
