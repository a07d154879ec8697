"""torch.compile takes an int8 model whole, prompt and decode with a static cache, and the logits stay."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, StaticCache

from modeling_grok1 import Grok1ForCausalLM, Grok1Int8Config
from modeling_grok1.quantized_grok1 import QuantizedExperts, QuantizedLinear


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_one_graph_for_the_prompt_and_one_for_every_token_after_it(small_config, tmp_path, dtype):
    Grok1ForCausalLM(small_config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=Grok1Int8Config(scale_blocks=4)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(3, 96, (1, 9))
    logits = []
    for forward in (model, compiled):
        cache = StaticCache(config=model.config, max_cache_len=16)
        steps = [forward(tokens[:, :6], past_key_values=cache, use_cache=True).logits[:, -1]]
        for position in range(6, 9):
            token, position_ids = tokens[:, position : position + 1], torch.tensor([[position]])
            output = forward(token, past_key_values=cache, position_ids=position_ids, use_cache=True)
            steps.append(output.logits[:, -1])
        logits.append(torch.cat(steps).float())
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
    eager, fast = logits
    assert (fast - eager).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * eager.norm()


def fill(module):
    for name, parameter in module.named_parameters():
        if name.endswith("_scale"):
            parameter.copy_(torch.rand(parameter.shape) * 0.01)
        else:
            parameter.copy_(torch.randint(-127, 128, parameter.shape))
    return module


@pytest.mark.parametrize("outputs", [48, 46], ids=["four streams", "one stream"])
@torch.no_grad()
def test_generated_code_for_one_token_is_right_and_reads_the_int8_in_place(outputs):
    """A copy of the chosen experts would be a buffer of theirs."""
    plain = nn.Module()
    plain.down_proj = torch.empty(4, 64, 2304, device="meta")
    experts = fill(QuantizedExperts(plain, bits=8, gate_up_blocks=1, down_blocks=2))
    linear = fill(QuantizedLinear(64, outputs, blocks=2))
    chosen, gates = torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.25]])
    x = torch.randn(1, 64)

    def run(x, chosen, gates):
        return linear(x), experts(x, chosen, gates)

    compiled, (code,) = torch._inductor.utils.run_and_get_code(
        torch.compile(run, fullgraph=True, dynamic=False), x, chosen, gates
    )
    for actual, expected in zip(compiled, run(x, chosen, gates), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert "quantised_grouped_matmul" not in code
    buffers = [line for line in code.splitlines() if "empty_strided_cpu(" in line and " = " in line]
    assert buffers
    assert not [line for line in buffers if "int8" in line]
