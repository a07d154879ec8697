"""config.json: every key that other engines read, literally, with the released model as the default."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


RELEASED = {
    "architectures": ["Grok1ForCausalLM"],
    "model_type": "grok-1",
    "auto_map": {
        "AutoConfig": "configuration_grok1.GrokConfig",
        "AutoModel": "modeling_grok1.Grok1Model",
        "AutoModelForCausalLM": "modeling_grok1.Grok1ForCausalLM",
        "AutoModelForDecision": "modeling_grok1.Grok1ForCausalLM",
    },
    "vocab_size": 131072,
    "hidden_size": 6144,
    "num_hidden_layers": 64,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 32768,
    "moe_intermediate_size": 32768,
    "attn_output_multiplier": 0.08838834764831845,
    "attn_logit_softcapping": 30.0,
    "max_attn_value": 30.0,
    "router_logit_softcapping": 0.0,
    "embedding_multiplier_scale": 78.38367176906169,
    "output_multiplier_scale": 0.5773502691896257,
    "logit_scale": 0.5773502691896257,
    "hidden_act": "gelu_pytorch_tanh",
    "norm_topk_prob": False,
    "moe_router_renormalize": False,
    "residual_moe": False,
    "load_presharded_moe": False,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# An engine that finds null here crashes.
NEVER_NULL = (
    "moe_intermediate_size",
    "head_dim",
    "attn_logit_softcapping",
    "max_attn_value",
    "router_logit_softcapping",
)


def saved(config: GrokConfig, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_every_key_is_written_literally(tmp_path):
    written = saved(GrokConfig(), tmp_path)
    assert {key: written.get(key) for key in RELEASED} == RELEASED
    assert "rope_type" not in written
    assert GrokConfig().to_dict()["auto_map"] == RELEASED["auto_map"]


def test_the_preset_is_the_default():
    preset = json.loads((Path(__file__).parents[2] / "configuration" / "grok-1.json").read_text())
    assert GrokConfig(**preset).to_dict() == GrokConfig().to_dict()


@pytest.mark.parametrize("key", NEVER_NULL)
def test_keys_that_must_not_be_null_are_not(tmp_path, key):
    small = GrokConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    assert saved(small, tmp_path)[key] is not None


def test_head_dim_follows_the_width_where_it_is_not_given():
    assert GrokConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim == 16
    assert GrokConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24).head_dim == 24


def test_a_saved_config_loads_equal_and_saves_equal(tmp_path):
    config = GrokConfig(num_experts=4, rope_theta=5000.0, output_multiplier_scale=0.25)
    first = saved(config, tmp_path / "a")
    loaded = AutoConfig.from_pretrained(tmp_path / "a")
    assert type(loaded) is GrokConfig
    assert saved(loaded, tmp_path / "b") == first
    assert first["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


def test_no_loading_option_reaches_config_json(tmp_path, small_config):
    model = Grok1ForCausalLM(small_config, experts_layout="linear")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "grok-1"
    assert not [key for key in written if key.startswith(("experts_", "expert_", "attn_impl", "_"))]


def test_keys_that_the_config_does_not_know_survive(tmp_path):
    assert saved(GrokConfig(my_note="kept"), tmp_path)["my_note"] == "kept"
