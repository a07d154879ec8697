"""`print(model)` shows the sizes of routers and experts in every layout."""

import pytest

from modeling_grok1 import Grok1ForCausalLM


@pytest.mark.parametrize(
    ("layout", "experts"),
    [
        ("fused", "(experts): Grok1Experts(num_experts=8, gate_up_proj=(8, 96, 32), down_proj=(8, 32, 48))"),
        ("linear", "(w1): Linear(in_features=32, out_features=48, bias=False)"),
    ],
)
def test_router_and_experts(small_config, tmp_path, layout, experts):
    Grok1ForCausalLM(small_config).save_pretrained(tmp_path)
    shown = repr(Grok1ForCausalLM.from_pretrained(tmp_path, experts_layout=layout))
    assert "(gate): Grok1TopKRouter(top_k=2, weight=(8, 32))" in shown
    assert experts in shown
