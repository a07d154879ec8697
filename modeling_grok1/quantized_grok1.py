# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Linear layers and experts with weights of 8 or 4 bits, which stay so in memory.

    dequantised[n, k] = float32(value[n, k]) * float32(scale[n, k // (K / G)])      then one cast to the compute dtype

Symmetric, one bfloat16 scale for each output and each of G contiguous blocks of inputs. In the release G is 8 for the
matrices that tensor parallelism cuts along their inputs (`o_proj`, and `w2` of the experts) and 1 for the others.

The dtype of a weight tells its form: int8, N K; int32, 4 bits as in packing_grok1.py; uint8, 4 bits as in
int4_grok1.py.

Letters as in modeling_grok1.py, and
    N  outputs of a matrix        G  scale blocks per row
    K  inputs of a matrix         S  rows of a product over several experts
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_grok1 import (
    FLOAT32,
    FLOATS,
    INT4PACK,
    INT8PACK,
    PLAIN,
    ROWS,
    TILES,
    can_multiply_chosen,
    chosen_matmul,
    level,
    products,
)
from .experts_grok1 import chosen_experts_forward, geglu, routed_sum
from .int4_grok1 import can_int4pack, int4_values, int4pack_matmul, is_for_cpu, order_for_cpu
from .int8_grok1 import can_int8pack, int8pack_matmul
from .kernels_grok1 import can_multiply_rows, can_multiply_tiles, floats, rows_matmul, tiled_matmul
from .packing_grok1 import merge_scales


# Elements that are dequantised at a time: they fit into a core's second-level cache.
DEQUANTISED_ELEMENTS = 2**20


# --------------------------------------------------------------------------------------------------------------------
# Weights in any of their forms
# --------------------------------------------------------------------------------------------------------------------
def outputs_and_inputs(weight: torch.Tensor) -> tuple[int, int]:
    """N and K of a weight, or of each of a stack of weights."""
    if is_for_cpu(weight):
        return weight.shape[-3] * weight.shape[-1] * 2, weight.shape[-2]
    return weight.shape[-2], weight.shape[-1] * (8 if weight.dtype == torch.int32 else 1)


def form_for_device(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and its scales in the form that the fastest products on their device read. On a CPU that is the fewest
    scales for int8; 4 bits stay as they are for the kernels, and without them are in torch's own order."""
    if weight.device.type != "cpu":
        return weight, scale
    if weight.dtype == torch.int8:
        return weight, merge_scales(scale)
    if is_for_cpu(weight) or (level().kernels and rows_are_whole(weight, scale)):
        return weight, scale
    return order_for_cpu(weight, scale)


def rows_are_whole(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether the kernels take rows of this packed weight."""
    x = torch.empty(1, outputs_and_inputs(weight)[1], dtype=torch.bfloat16)
    return can_multiply_rows(x, weight, scale)


def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight, or a stack of weights -> ... N K in `dtype`, the exact product rounded once."""
    values, scale = (weight, scale) if weight.dtype == torch.int8 else int4_values(weight, scale)
    # Both factors are exact in bfloat16, but a scale may be too small for float16.
    product = values.to(torch.float32 if dtype == torch.float16 else dtype)
    product.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(product.dtype).unsqueeze(-1))
    return product.to(dtype)


def floats_by_kernel(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `dequantise`, in one pass where there is a kernel for it."""
    x = torch.empty(1, outputs_and_inputs(weight)[1], dtype=dtype, device=weight.device)
    if weight.device.type == "cpu" and level().kernels and can_multiply_tiles(x, weight, scale):
        return floats(weight, scale, dtype)
    return dequantise(weight, scale, dtype)


def dequantised_parts(
    weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, convert: Callable = dequantise
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some outputs at a time: which, and their part of the dequantised weight, n K."""
    N, K = outputs_and_inputs(weight)  # noqa: N806
    block = weight.shape[-1] * 2 if is_for_cpu(weight) else 1
    blocks = max(1, DEQUANTISED_ELEMENTS // (K * block))
    for start in range(0, N // block, blocks):
        outputs = slice(start * block, (start + blocks) * block)
        part = scale[:, outputs] if is_for_cpu(weight) else scale[outputs]
        yield outputs, convert(weight[start : start + blocks], part, dtype)


# --------------------------------------------------------------------------------------------------------------------
# Products. `plain_matmul` is the reference; each fast one is tested against it.
# --------------------------------------------------------------------------------------------------------------------
def plain_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, convert: Callable = dequantise
) -> torch.Tensor:
    """x: S K times the transpose of the dequantised weight -> S N in the dtype of x."""
    y = x.new_empty(x.shape[0], outputs_and_inputs(weight)[0])
    for outputs, part in dequantised_parts(weight, scale, x.dtype, convert):
        y[:, outputs] = F.linear(x, part)
    return y


def floats_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As `plain_matmul`, dequantised by the kernel."""
    return plain_matmul(x, weight, scale, floats_by_kernel)


def float32_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As `plain_matmul`, in float32."""
    return plain_matmul(x.float(), weight, scale).to(x.dtype)


def is_bfloat16(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


# The products of cpu_grok1.TABLE: which rows and weights each takes, and its function.
CPU_PRODUCTS: dict[str, tuple[Callable[..., bool], Callable[..., torch.Tensor]]] = {
    ROWS: (can_multiply_rows, rows_matmul),
    TILES: (can_multiply_tiles, tiled_matmul),
    FLOATS: (is_bfloat16, floats_matmul),
    INT8PACK: (can_int8pack, int8pack_matmul),
    INT4PACK: (can_int4pack, int4pack_matmul),
    FLOAT32: (is_bfloat16, float32_matmul),
    PLAIN: (lambda *tensors: True, plain_matmul),
}


@functools.cache
def triton_matmul():
    """The kernel of triton_grok1.py, or None where Triton is not installed."""
    try:
        from .triton_grok1 import quantised_grouped_matmul
    except ImportError:
        return None
    return quantised_grouped_matmul


def quantised_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As `plain_matmul`, by the fastest product for these rows, this weight and this device."""
    if x.shape[0] == 0:
        return x.new_empty(0, outputs_and_inputs(weight)[0])
    if x.is_cuda and not is_for_cpu(weight) and (matmul := triton_matmul()) is not None:
        offsets = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
        return matmul(x, weight[None], scale[None], offsets)
    if x.device.type == "cpu":
        for product in products(level(), weight.dtype, x.shape[0], False):
            takes, matmul = CPU_PRODUCTS[product]
            if takes(x, weight, scale):
                return matmul(x, weight, scale)
    return plain_matmul(x, weight, scale)


class FrozenMatmul(torch.autograd.Function):
    """`quantised_matmul` with a gradient for x: adapters and norms around frozen weights can be trained."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return quantised_matmul(x, weight, scale)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        grad_x = grad.new_zeros(grad.shape[0], outputs_and_inputs(weight)[1], dtype=torch.float32)
        slow = grad.device.type == "cpu" and grad.dtype == torch.bfloat16 and not level().bfloat16
        outer = grad.float() if slow else grad
        for outputs, part in dequantised_parts(weight, scale, outer.dtype, floats_by_kernel):
            grad_x += outer[:, outputs] @ part
        return grad_x.to(grad.dtype), None, None


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """
    The rows of each expert times the transpose of its dequantised matrix.

    Args:
        x: S K, sorted by expert: rows offsets[e-1] .. offsets[e]-1 are those of expert e.
        weight, scale: those of all experts, stacked.
        offsets: E, int32.

    Returns:
        S N in the dtype of x; rows from offsets[-1] on are zero.
    """
    if x.is_cuda and not is_for_cpu(weight) and (matmul := triton_matmul()) is not None:
        return matmul(x, weight, scale, offsets)
    y = x.new_zeros(x.shape[0], outputs_and_inputs(weight)[0])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = quantised_matmul(x[start:end], weight[e], scale[e])
        start = end
    return y


# Opaque to torch.compile, which would otherwise break the graph at the experts' offsets. Transformers runs a file of
# remote code once per folder that it is loaded from, and an operator can be defined only once.
if not hasattr(torch.ops.grok1, "quantised_grouped_matmul"):
    grouped_matmul_op = torch.library.custom_op("grok1::quantised_grouped_matmul", grouped_matmul, mutates_args=())

    @grouped_matmul_op.register_fake
    def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], outputs_and_inputs(weight)[0])


# --------------------------------------------------------------------------------------------------------------------
# Modules. Scales are parameters, so that they are placed, sharded and offloaded with their weights.
# --------------------------------------------------------------------------------------------------------------------
def quantised_parameters(*shape: int, bits: int, blocks: int) -> tuple[nn.Parameter, nn.Parameter]:
    """An empty weight (... N K), int8 or packed int32, and its bfloat16 scales (... N G), G = `blocks`."""
    *outputs, K = shape  # noqa: N806
    if bits == 8:
        weight = nn.Parameter(torch.empty(*outputs, K, dtype=torch.int8), requires_grad=False)
    else:
        weight = nn.Parameter(torch.empty(*outputs, K // 8, dtype=torch.int32), requires_grad=False)
    scale = nn.Parameter(torch.empty(*outputs, blocks, dtype=torch.bfloat16), requires_grad=False)
    return weight, scale


class QuantizedLinear(nn.Linear):
    """x @ dequantised.T with a frozen `weight` and `weight_scale` in one of the forms above. PEFT adapts it, as every
    nn.Linear."""

    # Tensor parallelism passes plain local tensors instead of DTensors.
    _hf_quantized_needs_local_tp = True

    def __init__(self, in_features: int, out_features: int, bits: int = 8, blocks: int = 1):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.weight, self.weight_scale = quantised_parameters(out_features, in_features, bits=bits, blocks=blocks)
        self.register_parameter("bias", None)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802
        """The name by which PEFT recognises a module with `dequantize()`, whose floats DoRA takes the norms of."""
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """out in, float32, exact."""
        return dequantise(self.weight, self.weight_scale, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])  # S K
        weight, scale = self.weight, self.weight_scale
        if torch.is_grad_enabled() and x.requires_grad:
            y = FrozenMatmul.apply(rows, weight, scale)
        elif rows.shape[0] == 1 and can_multiply_chosen(rows, weight[None], scale[None]):
            y = chosen_matmul(rows, weight[None], torch.zeros(1, dtype=torch.long), scale[None])
        elif torch.compiler.is_compiling():
            offsets = torch.full((1,), rows.shape[0], dtype=torch.int32, device=x.device)
            y = torch.ops.grok1.quantised_grouped_matmul(rows, weight[None], scale[None], offsets)
        else:
            y = quantised_matmul(rows, weight, scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class QuantizedExperts(nn.Module):
    """
    All experts of a layer; the quantised form of modeling_grok1.Grok1Experts, which is `plain_class`.

    gate_up_proj, E 2F D, gate first, and down_proj, E D F, with their scales in one of the forms above.
    """

    _hf_quantized_needs_local_tp = True
    _is_expert_parallel = False

    def __init__(self, plain: Any, bits: int, gate_up_blocks: int, down_blocks: int):
        super().__init__()
        E, D, F_ = plain.down_proj.shape  # noqa: N806
        self.num_experts = E  # expert parallelism sets this rank's number
        self.plain_class = type(plain)
        self.bits = bits
        self.gate_up_proj, self.gate_up_proj_scale = quantised_parameters(
            E, 2 * F_, D, bits=bits, blocks=gate_up_blocks
        )
        self.down_proj, self.down_proj_scale = quantised_parameters(E, D, F_, bits=bits, blocks=down_blocks)

    @property
    def is_transposed(self) -> bool:
        """What PEFT asks of experts before it adds floats to one of their parameters."""
        raise ValueError(
            "`target_parameters` cannot adapt fused quantised experts: load the model with `experts_layout='linear'` "
            "and name the matrices of the experts, `target_modules=['w1', 'w2', 'w3']`."
        )

    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(geglu(gate_e(x), up_e(x))); x: N D, experts and gates: N k.

        The expert number `num_experts` marks an expert of another rank, whose gate is zero.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.trainable_forward(x, experts, gates)
        pairs = ((self.gate_up_proj, self.gate_up_proj_scale), (self.down_proj, self.down_proj_scale))
        if x.shape[0] == 1 and all(can_multiply_chosen(x, *pair) for pair in pairs):
            return chosen_experts_forward(self, x, experts, gates)
        N, k = experts.shape  # noqa: N806
        chosen, order = experts.flatten().sort(stable=True)  # S = N*k
        counts = (chosen[:, None] == torch.arange(self.num_experts, device=x.device)).sum(dim=0)
        offsets = counts.cumsum(dim=0, dtype=torch.int32)
        matmul = torch.ops.grok1.quantised_grouped_matmul if torch.compiler.is_compiling() else grouped_matmul
        y = matmul(x[order // k], self.gate_up_proj, self.gate_up_proj_scale, offsets)  # S 2F
        y = matmul(geglu(*y.chunk(2, dim=-1)), self.down_proj, self.down_proj_scale, offsets)  # S D
        y = y * gates.flatten()[order, None]
        return torch.empty_like(y).index_copy_(0, order, y).view(N, k, -1).sum(dim=1)

    def trainable_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `forward`, one expert at a time, with a gradient for x and gates."""

        def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
            y = FrozenMatmul.apply(rows, self.gate_up_proj[e], self.gate_up_proj_scale[e])
            return FrozenMatmul.apply(geglu(*y.chunk(2, dim=-1)), self.down_proj[e], self.down_proj_scale[e])

        return routed_sum(x, experts, gates, expert, self.num_experts)

    def extra_repr(self) -> str:
        E = self.down_proj.shape[0]  # noqa: N806
        (D, F_) = outputs_and_inputs(self.down_proj)  # noqa: N806
        return f"num_experts={E}, dim={D}, hidden_dim={F_}, bits={self.bits}"
