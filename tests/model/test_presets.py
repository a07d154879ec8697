"""The named configurations."""

import pytest

from grok1.configuration import load_preset, preset_names
from modeling_grok1 import GrokConfig


def test_the_release_is_the_default():
    assert load_preset("grok-1").to_dict() == GrokConfig().to_dict()


def test_the_demo_is_a_scaled_grok_1():
    config = load_preset("demo")
    assert config.embedding_multiplier_scale == config.hidden_size**0.5
    assert config.attn_output_multiplier == pytest.approx(config.head_dim**-0.5)
    assert config.output_multiplier_scale == GrokConfig().output_multiplier_scale
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert config.num_hidden_layers >= 4 and config.num_attention_heads > config.num_key_value_heads


def test_an_unknown_name_is_refused_with_the_known_ones():
    assert preset_names() == ["demo", "grok-1"]
    with pytest.raises(ValueError, match="expected one of demo, grok-1, found 'grok-2'"):
        load_preset("grok-2")
