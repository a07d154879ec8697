"""What xAI's code does not compute is refused by name, expected and found, as a ValueError, wherever it is said."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_grok1 import Grok1ForCausalLM, Grok1Model, GrokConfig


UNSUPPORTED = {
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "moe_router_renormalize": True,
    "router_logit_softcapping": 30.0,
    "residual_moe": True,
    "load_presharded_moe": True,
    "num_experts_per_tok": 9,
    "num_key_value_heads": 7,
    "head_dim": 127,
    "num_hidden_layers": 0,
    "vocab_size": -1,
    "rms_norm_eps": 0.0,
    "attn_logit_softcapping": 0.0,
    "attn_output_multiplier": float("nan"),
    "embedding_multiplier_scale": float("inf"),
}
WRONG_TYPE = {"num_experts": "8", "attn_logit_softcapping": None, "intermediate_size": None, "norm_topk_prob": "false"}
ROPE = [
    {"rope_type": "nonsense", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4},  # without its factor
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
]


@pytest.mark.parametrize("key", [*UNSUPPORTED, *WRONG_TYPE])
def test_unsupported_values_are_refused_in_a_call_a_file_and_an_override(tmp_path, key):
    value = UNSUPPORTED.get(key, WRONG_TYPE.get(key))
    refusal = rf"(?s){key}.*expected|expected.*{key}"
    with pytest.raises(ValueError, match=refusal):
        GrokConfig(**{key: value})

    GrokConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refusal):
        GrokConfig.from_pretrained(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=refusal):
        AutoModelForCausalLM.from_pretrained(tmp_path, **{key: value})

    path = tmp_path / "config.json"
    content = {**json.loads(path.read_text()), key: value}
    for twin, field in GrokConfig.attribute_map.items():
        if field == key:
            content[twin] = value
    path.write_text(json.dumps(content))
    for auto in (GrokConfig, AutoConfig):
        with pytest.raises(ValueError, match=refusal):
            auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_embeddings_that_cannot_be_computed_are_refused(rope):
    with pytest.raises(ValueError, match="rope"):
        GrokConfig(rope_parameters=rope)


def test_what_was_found_and_expected_is_said_for_all_problems_at_once():
    with pytest.raises(ValueError) as refusal:
        GrokConfig(hidden_act="silu", norm_topk_prob=True, router_logit_softcapping=30.0, num_key_value_heads=0)
    message = str(refusal.value)
    assert (
        "`hidden_act`: expected 'gelu_pytorch_tanh' (jax.nn.gelu is the tanh approximation), found 'silu'" in message
    )
    assert "`norm_topk_prob`: expected False" in message
    assert "`router_logit_softcapping`: expected 0.0" in message
    assert "`num_key_value_heads`: expected a positive number, found 0" in message


def test_an_override_can_mend_a_file(tmp_path):
    GrokConfig().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act"):
        GrokConfig.from_pretrained(tmp_path)
    assert GrokConfig.from_pretrained(tmp_path, hidden_act="gelu_pytorch_tanh").hidden_act == "gelu_pytorch_tanh"


def test_a_model_validates_fields_that_were_set_afterwards(small_config):
    small_config.hidden_act = "silu"
    for model_class in (Grok1Model, Grok1ForCausalLM):
        with pytest.raises(ValueError, match=r"`hidden_act`: expected 'gelu_pytorch_tanh'.*found 'silu'"):
            model_class(small_config)


def test_setting_a_field_to_a_wrong_type_is_a_value_error():
    with pytest.raises(ValueError, match="num_experts"):
        GrokConfig().num_experts = "eight"
