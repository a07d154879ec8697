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
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ExpertsInterface
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .configuration_grok1 import GrokConfig
from .cpu_grok1 import PLAIN, can_multiply_chosen, chosen_matmul, is_first, keep_freed_memory


logger = logging.get_logger(__name__)

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


class FusedWeight:
    """
    The parameter of all experts (E O I) in one call of a layer: `fused(e, rows)` is `F.linear(rows, weight[e])`.

    In training the backward pass writes the gradient of each matrix into its place in that of the whole parameter.
    Indexing would add a parameter of zeros for each expert, and `unbind` copies all gradients once more.
    """

    def __init__(self, weight: torch.Tensor):
        self.weight = weight
        self.matrices = weight.unbind(0)
        plain = type(weight) in (torch.Tensor, nn.Parameter) and not hasattr(weight, "ds_id")  # not cut by ZeRO-3
        training = weight.requires_grad and torch.is_grad_enabled()
        self.in_place = plain and training and not torch.compiler.is_compiling()
        self.called: set[int] = set()
        self.pending: set[int] = set()
        self.gradient: torch.Tensor | None = None

    def __call__(self, e: int, rows: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled(rows.device.type)
        if not self.in_place or autocast or rows.dtype != self.weight.dtype or e in self.called:
            return F.linear(rows, self.matrices[e])
        self.called.add(e)
        return ExpertProduct.apply(rows, self.weight, e, self)

    def add_gradient(self, e: int, gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
        """The gradient of the parameter once those of all its products are there, None before."""
        if self.gradient is None:
            self.gradient, self.pending = torch.empty_like(self.weight), set(self.called)
            for other in set(range(len(self.weight))) - self.called:
                self.gradient[other].zero_()
        torch.mm(gradient.t(), rows, out=self.gradient[e])
        self.pending.remove(e)
        if self.pending:
            return None
        whole, self.gradient = self.gradient, None
        return whole


class ExpertProduct(torch.autograd.Function):
    """`F.linear(rows, weight[e])` of `FusedWeight`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, e: int, fused: FusedWeight) -> torch.Tensor:
        ctx.e, ctx.fused = e, fused
        ctx.save_for_backward(rows, weight)
        return F.linear(rows, weight[e])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows = gradient @ weight[ctx.e] if ctx.needs_input_grad[0] else None
        of_weight = ctx.fused.add_gradient(ctx.e, gradient, rows) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, None, None


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
        sequences = adapted_sequences(self[0])
        if sequences is not None:
            return self.mixed_forward(x, experts, gates, sequences)
        all_experts = self.training or hasattr(next(self.parameters()), "ds_id")
        return routed_sum(x, experts, gates, lambda e, rows: self[e](rows), len(self), all_experts)

    def mixed_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor, B: int) -> torch.Tensor:  # noqa: N803
        """
        The same for a batch whose B sequences have adapters of their own: the linear layers take B rows of tokens, as
        many in each as the sequence with most of them has, and zeros beside them.
        """
        output = torch.zeros_like(x)
        T = len(x) // B  # noqa: N806
        for e in experts.unique().tolist():
            token, slot = torch.where(experts == e)  # ascending
            sequence = token // T
            count = sequence.bincount(minlength=B)
            place = torch.arange(len(token), device=x.device) - (count.cumsum(0) - count)[sequence]
            rows = x.new_zeros(B, int(count.max()), x.shape[-1])
            rows[sequence, place] = x[token]
            y = self[e](rows)[sequence, place] * gates[token, slot, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


def adapted_sequences(expert: nn.Module) -> int | None:
    """The number of sequences for which PEFT was given `adapter_names`, or None. It passes them by a hook."""
    for module in expert.modules():
        for hook in module._forward_pre_hooks.values():
            names = getattr(hook, "keywords", {}).get("adapter_names")
            if names is not None:
                return len(names)
    return None


def chosen_experts_forward(self: Any, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """One row (x: 1 D) on a CPU: reads the chosen matrices, floating or quantised, in place, at the memory's rate."""
    chosen = experts[0].clamp(max=self.num_experts - 1)  # k; an expert of another rank has the gate 0
    scales = [getattr(self, f"{name}_scale", None) for name in ("gate_up_proj", "down_proj")]
    y = chosen_matmul(x.expand(len(chosen), -1), self.gate_up_proj, chosen, scales[0])  # k 2F
    y = chosen_matmul(geglu(*y.chunk(2, dim=-1)), self.down_proj, chosen, scales[1])  # k D
    return (y * gates.T).sum(dim=0, keepdim=True)  # rounded as in `routed_sum`


def can_group(self: Any, x: torch.Tensor) -> bool:
    """Whether torch has a grouped product of these: not in float64, and of rows of a multiple of 16 bytes only."""
    widths = (self.gate_up_proj.shape[-1], self.down_proj.shape[-1])
    return x.dtype != torch.float64 and all(width * x.element_size() % 16 == 0 for width in widths)


def grouped_experts_forward(self: Any, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`experts_implementation="grouped_mm"`, and `"batched_mm"` in ONNX, which has no grouped product."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        logger.warning_once(
            "ONNX has no grouped product: the experts are exported as `experts_implementation='batched_mm'`, which "
            "copies the matrices of the chosen experts for every token."
        )
        return ExpertsInterface()["batched_mm"](self, x, experts, gates)
    return ExpertsInterface()["grouped_mm"](self, x, experts, gates)


def default_experts_forward(self: Any, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """
    `experts_implementation="grok1"`, the default: Transformers' `"grouped_mm"` where torch has that product, and on a
    CPU only while there are few rows; its grouped product is a loop too, and gathers all rows before. Elsewhere the
    loop over the chosen experts, `"eager"`.
    """
    on_cpu, one_row = x.device.type == "cpu", x.shape[0] == 1
    if one_row and all(can_multiply_chosen(x, weight) for weight in (self.gate_up_proj, self.down_proj)):
        return chosen_experts_forward(self, x, experts, gates)
    if torch.compiler.is_compiling():
        return grouped_experts_forward(self, x, experts, gates)
    slow = x.dtype == torch.bfloat16 and not is_first(PLAIN, x.dtype, 2, False, torch.is_grad_enabled())
    long_prompt = on_cpu and (x.shape[0] > GROUPED_ROWS_ON_CPU or slow)
    if long_prompt:
        keep_freed_memory()
    if long_prompt or (on_cpu and one_row) or not can_group(self, x):
        return self.eager_forward(x, experts, gates)
    return grouped_experts_forward(self, x, experts, gates)


# Transformers validates names against the global table; the model dispatches through the local one.
ExpertsInterface.register(DEFAULT_EXPERTS, default_experts_forward)
ALL_EXPERTS_FUNCTIONS = ExpertsInterface()
ALL_EXPERTS_FUNCTIONS[DEFAULT_EXPERTS] = default_experts_forward
ALL_EXPERTS_FUNCTIONS["grouped_mm"] = grouped_experts_forward
