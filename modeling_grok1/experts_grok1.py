# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
What every implementation of the experts shares, the gate and the loop over experts; the linear layout; and which
product the fused experts take. Letters as in modeling_grok1.py.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ExpertsInterface
from transformers.utils.generic import maybe_autocast

from .configuration_grok1 import GrokConfig
from .cpu_grok1 import keep_freed_memory, matmul_by_reduction


# The default of `experts_implementation`; see `default_experts_forward`.
DEFAULT_EXPERTS = "grok1"
# Up to this number of rows, gathering all rows for one grouped product costs a CPU less than a product per expert.
GROUPED_ROWS_ON_CPU = 96


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(gate) * up, the gated unit of every expert (https://arxiv.org/abs/2002.05202). `jax.nn.gelu` is the
    tanh approximation by default."""
    return F.gelu(gate, approximate="tanh") * up


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """The router is float32 under autocast too."""
    return maybe_autocast(device_type=x.device.type, enabled=False)


def routed_sum(
    x: torch.Tensor,  # N D
    experts: torch.Tensor,  # N k; the number `num_experts` marks an expert of another rank
    gates: torch.Tensor,  # N k
    expert: Callable[[int, torch.Tensor], torch.Tensor],  # e, rows D -> rows D
    num_experts: int,
    all_experts: bool = False,
) -> torch.Tensor:
    """
    sum over j of gates[n, j] * expert(experts[n, j], x[n]) -> N D.

    Only the chosen experts are called. `all_experts` calls the others too, with no rows, so that every expert takes
    part in the backward pass: data parallelism needs the same gradients on each rank.
    """
    output = torch.zeros_like(x)
    for e in range(num_experts) if all_experts else experts.unique().tolist():
        if e == num_experts:
            continue
        token, slot = torch.where(experts == e)
        y = expert(e, x[token]) * gates[token, slot, None]
        output.index_add_(0, token, y.to(output.dtype))
    return output


class Shapes:
    """Mixin of modules: `print(model)` shows the shapes of their parameters, and how many experts are active."""

    def extra_repr(self) -> str:
        shapes = [f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters()]  # type: ignore[attr-defined]
        return ", ".join([*shapes, *([f"top_k={self.top_k}"] if hasattr(self, "top_k") else [])])


class Grok1Expert(nn.Module):
    """One expert of the linear layout: w1 is its gate, w3 its up and w2 its down projection."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(geglu(self.w1(x), self.w3(x)))


class Grok1LinearExperts(nn.ModuleList):
    """
    The experts of a layer as modules of their own. Inference runs, and reads, only the chosen ones. In training all
    take part, the others with no rows: DDP, FSDP and ZeRO expect the same gradients on every rank. So they do where
    ZeRO-3 has cut their weights, which each rank gathers from all.
    """

    def __init__(self, config: GrokConfig):
        super().__init__(Grok1Expert(config) for _ in range(config.num_experts))

    @torch.compiler.disable(
        reason="which linear experts run is known only after the router: use `experts_layout='fused'` for a full graph"
    )
    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `Grok1Experts.eager_forward`."""
        all_experts = self.training or hasattr(next(self.parameters()), "ds_id")
        return routed_sum(x, experts, gates, lambda e, rows: self[e](rows), len(self), all_experts)


def chosen_experts_forward(self: Any, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """One row (x: 1 D) on a CPU under torch.compile: reads the chosen matrices in place, at the memory's rate."""
    chosen = experts[0].clamp(max=self.num_experts - 1)  # k; an expert of another rank has the gate 0
    y = matmul_by_reduction(x.expand(len(chosen), -1), self.gate_up_proj, chosen)  # k 2F
    y = matmul_by_reduction(geglu(*y.chunk(2, dim=-1)), self.down_proj, chosen)  # k D
    return gates @ y


def can_group(self: Any, x: torch.Tensor) -> bool:
    """Whether torch has a grouped product of these: not in float64, and of rows of a multiple of 16 bytes only."""
    widths = (self.gate_up_proj.shape[-1], self.down_proj.shape[-1])
    return x.dtype != torch.float64 and all(width * x.element_size() % 16 == 0 for width in widths)


def default_experts_forward(self: Any, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """
    `experts_implementation="grok1"`, the default: Transformers' `"grouped_mm"` where torch has that product, and on a
    CPU only while there are few rows; its grouped product is a loop too, and gathers all rows before. Elsewhere the
    loop over the chosen experts, `"eager"`.
    """
    on_cpu, one_row = x.device.type == "cpu", x.shape[0] == 1
    if torch.compiler.is_compiling():
        if on_cpu and one_row and not torch.is_grad_enabled():
            return chosen_experts_forward(self, x, experts, gates)
        return ExpertsInterface()["grouped_mm"](self, x, experts, gates)
    long_prompt = on_cpu and x.shape[0] > GROUPED_ROWS_ON_CPU
    if long_prompt:
        keep_freed_memory()
    if long_prompt or (on_cpu and one_row) or not can_group(self, x):
        return self.eager_forward(x, experts, gates)
    return ExpertsInterface()["grouped_mm"](self, x, experts, gates)


# Transformers validates names against the global table; the model dispatches through the local one.
ExpertsInterface.register(DEFAULT_EXPERTS, default_experts_forward)
ALL_EXPERTS_FUNCTIONS = ExpertsInterface()
ALL_EXPERTS_FUNCTIONS[DEFAULT_EXPERTS] = default_experts_forward
