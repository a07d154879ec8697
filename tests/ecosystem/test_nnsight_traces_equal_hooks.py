"""nnsight 0.8 reads a router's logits and an expert's output in a trace: the values that forward hooks see."""

import pytest
import torch


pytest.importorskip("nnsight")

from nnsight import NNsight
from small_grok import prompt, save_small_grok
from transformers import AutoModelForCausalLM

import modeling_grok1  # noqa: F401


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    folder = save_small_grok(tmp_path_factory.mktemp("small"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout="linear").eval()


def test_router_logits_and_an_experts_output(model):
    ids, seen = prompt(), {}
    block = model.model.layers[1].block_sparse_moe
    expert = int(block.gate(torch.randn(1, 64))[2].flatten()[0])
    hooks = [
        block.gate.register_forward_hook(lambda module, args, output: seen.update(router=output[0].detach())),
        block.experts[expert].w2.register_forward_hook(
            lambda module, args, output: seen.update(expert=output.detach())
        ),
    ]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    traced = NNsight(model)
    with torch.no_grad(), traced.trace(ids):
        layer = traced.model.layers[1].block_sparse_moe
        router = layer.gate.output[0].save()
        output = layer.experts[expert].w2.output.save()
        result = traced.output.logits.save()
    assert torch.equal(router, seen["router"])
    assert torch.equal(output, seen["expert"])
    assert torch.equal(result, logits)
