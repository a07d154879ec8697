"""llama.cpp's arithmetic where it is not Grok-1's, put into a loaded model: what is explained here can be measured.

All of it is for models with linear experts in float32 (`experts_layout="linear", dtype=torch.float32`).
"""

import torch
import torch.nn.functional as F
from activations import replace_activation
from torch import nn

from modeling_grok1 import Grok1ForCausalLM
from modeling_grok1.modeling_grok1 import Grok1TopKRouter


BLOCK = 32  # of q8_0: so many values share a scale


class TableGELU(nn.Module):
    """ggml's GELU on the CPU: a table over all float16 numbers between -10 and 10, outside of them 0 and x."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = F.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


def look_up_gelu(model: Grok1ForCausalLM) -> Grok1ForCausalLM:
    """GELU from ggml's table of float16 numbers."""
    replace_activation(model, TableGELU())
    return model


def renormalise_gates(model: Grok1ForCausalLM) -> Grok1ForCausalLM:
    """The gates of the chosen experts divided by their sum."""

    def divide(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
        logits, gates, experts = output
        return logits, gates / gates.sum(-1, keepdim=True), experts

    for module in model.modules():
        if isinstance(module, Grok1TopKRouter):
            module.register_forward_hook(divide)
    return model


def round_to_q8_0(x: torch.Tensor) -> torch.Tensor:
    """q8_0 and back: int8 times a float16 scale, the largest magnitude / 127, for 32 values in a row."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    whole = torch.where(scales > 0, blocks / scales, torch.zeros_like(blocks)).round()
    return (whole * scales.half().float()).flatten(-2)


def round_activations(model: Grok1ForCausalLM) -> Grok1ForCausalLM:
    """What enters a matrix that is stored in q8_0 is rounded to q8_0 as well: all of them but the routers."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (round_to_q8_0(inputs[0]), *inputs[1:]))
    return model


def shake(model: Grok1ForCausalLM) -> Grok1ForCausalLM:
    """Every norm weight moved by at most 1.2e-7 of itself, one unit in the last place of a float32.

    What this moves a logit by is the least that two correct float32 programs differ by.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight *= 1 + (torch.rand(weight.shape, generator=generator) - 0.5) * 2.4e-7
    return model
