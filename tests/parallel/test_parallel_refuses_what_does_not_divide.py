"""Sizes along which the weights cannot be cut are refused by name, before a weight is read."""

import pytest
import torch
from small_grok import SIZES, save_small_grok
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.quantization_grok1 import Grok1Int8Config, Grok1Quantizer


def build(distributed, experts_layout=None, **sizes):
    config = GrokConfig(**{**SIZES, **sizes})
    config.distributed_config = DistributedConfig(**distributed)
    with torch.device("meta"):
        return Grok1ForCausalLM(config, experts_layout=experts_layout)


@pytest.mark.parametrize(
    ("distributed", "sizes", "message"),
    [
        ({"tp_size": 3}, {}, r"`tp_size`: expected a divisor of `num_attention_heads` \(8\), found 3"),
        ({"tp_size": 8}, {}, r"`tp_size`: expected a divisor of `num_key_value_heads` \(4\), found 8"),
        ({"tp_size": 4}, {"intermediate_size": 90}, r"`tp_size`: expected a divisor of `intermediate_size` \(90\)"),
        ({"fsdp_size": 3, "ep_size": 3}, {}, r"`ep_size`: expected a divisor of `num_experts` \(8\), found 3"),
        ({"fsdp_size": 4, "ep_size": 4}, {"num_experts": 6}, r"`ep_size`: expected a divisor of `num_experts` \(6\)"),
        ({"pp_size": 5}, {}, r"`pp_size`: expected at most `num_hidden_layers` \(4\), found 5"),
        ({"pp_size": 2, "tp_size": 2}, {}, r"`pp_size`: Transformers does not cut the layers of a pipeline further"),
    ],
)
def test_a_count_that_does_not_divide_is_refused_by_name(distributed, sizes, message):
    with pytest.raises(ValueError, match=message):
        build(distributed, **sizes)


def test_all_problems_come_at_once():
    with pytest.raises(ValueError) as refusal:
        build({"tp_size": 3, "fsdp_size": 5, "ep_size": 15})
    assert all(name in str(refusal.value) for name in ("num_attention_heads", "num_key_value_heads", "num_experts"))


@pytest.mark.parametrize("distributed", [{"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}])
def test_linear_experts_have_no_plan(distributed):
    with pytest.raises(ValueError, match="`experts_layout='linear'` has no tensor- or expert-parallel plan"):
        build(distributed, experts_layout="linear")


@pytest.mark.parametrize(
    "distributed",
    [{"tp_size": 4}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 8, "ep_size": 8}, {"pp_size": 3}, {"fsdp_size": 7}],
)
def test_what_divides_is_accepted(distributed):
    assert build(distributed).num_parameters() > 0


def test_expert_parallelism_does_not_cut_through_an_expert():
    assert build({"tp_size": 4, "ep_size": 4}, intermediate_size=90).num_parameters() > 0


@pytest.mark.parametrize(("blocks", "tp_size"), [(8, 3), (1, 2), (4, 8)])
def test_scale_blocks_that_tensor_parallelism_would_split_are_refused_by_name(blocks, tp_size):
    heads = {"num_attention_heads": 24, "num_key_value_heads": 24}
    model = build({"tp_size": tp_size}, **heads)
    quantizer = Grok1Quantizer(Grok1Int8Config(scale_blocks=blocks), pre_quantized=True)
    with pytest.raises(
        ValueError, match=rf"`tp_size`: expected a divisor of the {blocks} scale blocks .* found {tp_size}"
    ):
        quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map=None, checkpoint_files=None)


def test_a_model_that_reads_its_experts_from_disk_is_for_one_process(tmp_path):
    config = GrokConfig(**SIZES)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="`experts_on` is for one process"):
        Grok1ForCausalLM(config, experts_on="disk")
    # and through from_pretrained, where one process alone is a configuration like any other
    folder = save_small_grok(tmp_path, num_hidden_layers=1)
    with pytest.raises(ValueError, match="`experts_on` is for one process"):
        AutoModelForCausalLM.from_pretrained(
            folder, experts_on="disk", distributed_config=DistributedConfig(tp_size=1)
        )
