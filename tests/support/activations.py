"""Experts with another activation, as engines with a mistake in it have."""

from collections.abc import Callable

import torch
from torch import nn

from modeling_grok1.experts_grok1 import Grok1Expert


def replace_activation(model: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """down(activation(gate(x)) * up(x)) in every expert of a model with linear experts."""
    for expert in model.modules():
        if isinstance(expert, Grok1Expert):
            expert.forward = lambda x, e=expert: e.w2(activation(e.w1(x)) * e.w3(x))
