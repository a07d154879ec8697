# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Linear layers and experts with int8 weights: one byte per parameter in memory.

    dequantised[o, i] = float32(weight[o, i]) * float32(scale[o, i // (K / G)])      then one cast to the compute dtype

Symmetric, one bfloat16 scale for each output and each of G contiguous blocks of inputs. In the release G is 8 for the
matrices that tensor parallelism cuts along their inputs (`o_proj`, and `w2` of the experts) and 1 for the others.

Letters as in modeling_grok1.py, and
    K  inputs of a matrix         G  scale blocks per row         S  rows of a product over several experts
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from .cpu_grok1 import compiled_row, matmul_by_reduction
from .experts_grok1 import geglu, routed_sum


# Elements that are dequantised at a time: they fit into a core's second-level cache.
DEQUANTISED_ELEMENTS = 2**20
# Rows times scale blocks up to which torch's int8 product is faster on a CPU than dequantising: it converts the weight
# once for four rows.
INT8PACK_ROWS = 16
# Torch's int8 product reads 16 bytes at a time, from aligned addresses only.
INT8PACK_ALIGNMENT = 16


# --------------------------------------------------------------------------------------------------------------------
# Products. `plain_matmul` is the reference; each fast one is tested against it.
# --------------------------------------------------------------------------------------------------------------------
def dequantise(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """weight: ... K, int8; scale: ... G, bfloat16 -> ... K in `dtype`, the exact product rounded once."""
    # Both factors are exact in bfloat16, but a scale may be too small for float16.
    product = weight.to(torch.float32 if dtype == torch.float16 else dtype)
    product.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(product.dtype).unsqueeze(-1))
    return product.to(dtype)


def quantise(weight: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    weight: ... K, floating -> int8 ... K and its bfloat16 scales ... G, max/127 of each of G = `blocks` blocks.

    The scale is rounded to nearest. Its relative error is below 2^-8, so the largest quotient is below 127.5 and no
    value is clipped; and what `dequantise` made in bfloat16 comes back as it was.
    """
    grouped = weight.float().unflatten(-1, (blocks, -1))
    scale = (grouped.abs().amax(dim=-1) / 127).to(torch.bfloat16)
    steps = scale.float().unsqueeze(-1)
    values = torch.where(steps > 0, grouped / steps, 0.0).round_()
    return values.to(torch.int8).flatten(-2), scale


def plain_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: S K times the transpose of the dequantised weight (N K, int8; scale: N G) -> S N in the dtype of x."""
    rows = max(1, DEQUANTISED_ELEMENTS // weight.shape[1])
    y = x.new_empty(x.shape[0], weight.shape[0])
    for n in range(0, weight.shape[0], rows):
        y[:, n : n + rows] = F.linear(x, dequantise(weight[n : n + rows], scale[n : n + rows], x.dtype))
    return y


def int8pack_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    As `plain_matmul` for a few rows of bfloat16 on a CPU, by torch's `_weight_int8pack_mm`, which reads the int8 once
    and accumulates in float32. K must be a multiple of 16.
    """
    S, G = x.shape[0], scale.shape[-1]  # noqa: N806
    # Torch's kernel crashes where x or the weight is not aligned, and a memory-mapped weight begins at any address.
    if weight.data_ptr() % INT8PACK_ALIGNMENT != 0:
        rows = max(1, DEQUANTISED_ELEMENTS // weight.shape[1])
        parts = zip(weight.split(rows), scale.split(rows), strict=True)
        return torch.cat([int8pack_matmul(x, w.clone(), s) for w, s in parts], dim=-1)
    if G == 1:
        x = x.contiguous() if x.data_ptr() % INT8PACK_ALIGNMENT == 0 else x.clone()
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale.squeeze(-1))
    # Torch's kernel knows one scale per output only: one row per block, which is zero outside of the block.
    blocks = x.unflatten(-1, (G, -1))  # S G K/G
    blocks = torch.diag_embed(blocks.transpose(1, 2)).permute(0, 3, 2, 1).reshape(S * G, -1)
    sums = torch.ops.aten._weight_int8pack_mm(blocks, weight, scale.new_ones(weight.shape[0]))
    return (sums.view(S, G, -1).float() * scale.T.float()).sum(dim=1).to(x.dtype)


@functools.cache
def triton_matmul():
    """The kernel of triton_grok1.py, or None where Triton is not installed."""
    try:
        from .triton_grok1 import int8_grouped_matmul
    except ImportError:
        return None
    return int8_grouped_matmul


def int8_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x: S K times the transpose of the dequantised weight (N K, int8; scale: N G) -> S N in the dtype of x."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if x.is_cuda and (matmul := triton_matmul()) is not None:
        offsets = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
        return matmul(x, weight[None], scale[None], offsets)
    few_rows = x.shape[0] * scale.shape[-1] <= INT8PACK_ROWS
    if few_rows and x.shape[1] % INT8PACK_ALIGNMENT == 0 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return int8pack_matmul(x, weight, scale)
    return plain_matmul(x, weight, scale)


class FrozenMatmul(torch.autograd.Function):
    """`int8_matmul` with a gradient for x: adapters and norms around frozen int8 weights can be trained."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return int8_matmul(x, weight, scale)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        rows = max(1, DEQUANTISED_ELEMENTS // weight.shape[1])
        grad_x = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=torch.float32)
        for n in range(0, weight.shape[0], rows):
            grad_x += grad[:, n : n + rows] @ dequantise(weight[n : n + rows], scale[n : n + rows], grad.dtype)
        return grad_x.to(grad.dtype), None, None


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """
    The rows of each expert times the transpose of its dequantised matrix.

    Args:
        x: S K, sorted by expert: rows offsets[e-1] .. offsets[e]-1 are those of expert e.
        weight: E N K, int8.
        scale: E N G, bfloat16.
        offsets: E, int32.

    Returns:
        S N in the dtype of x; rows from offsets[-1] on are zero.
    """
    if x.is_cuda and (matmul := triton_matmul()) is not None:
        return matmul(x, weight, scale, offsets)
    y = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = int8_matmul(x[start:end], weight[e], scale[e])
        start = end
    return y


# Opaque to torch.compile, which would otherwise break the graph at the experts' offsets. Transformers runs a file of
# remote code once per folder that it is loaded from, and an operator can be defined only once.
if not hasattr(torch.ops.grok1, "int8_grouped_matmul"):
    grouped_matmul_op = torch.library.custom_op("grok1::int8_grouped_matmul", grouped_matmul, mutates_args=())

    @grouped_matmul_op.register_fake
    def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])


# --------------------------------------------------------------------------------------------------------------------
# Modules. Scales are parameters, so that they are placed, sharded and offloaded with their weights.
# --------------------------------------------------------------------------------------------------------------------
def int8_parameters(*shape: int, blocks: int) -> tuple[nn.Parameter, nn.Parameter]:
    """An empty int8 weight (... K) and its bfloat16 scales (... G), G = `blocks`."""
    weight = nn.Parameter(torch.empty(*shape, dtype=torch.int8), requires_grad=False)
    scale = nn.Parameter(torch.empty(*shape[:-1], blocks, dtype=torch.bfloat16), requires_grad=False)
    return weight, scale


class Int8Linear(nn.Linear):
    """x @ dequantised.T; weight: out in, int8, frozen; weight_scale: out G, bfloat16. PEFT adapts every nn.Linear."""

    # Tensor parallelism passes plain local tensors instead of DTensors.
    _hf_quantized_needs_local_tp = True

    def __init__(self, in_features: int, out_features: int, blocks: int = 1):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight, self.weight_scale = int8_parameters(out_features, in_features, blocks=blocks)
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
        if torch.is_grad_enabled() and x.requires_grad:
            y = FrozenMatmul.apply(rows, self.weight, self.weight_scale)
        elif compiled_row(rows):
            only = torch.zeros(1, dtype=torch.long)
            y = matmul_by_reduction(rows, self.weight[None], only, self.weight_scale[None])
        elif torch.compiler.is_compiling():
            offsets = torch.full((1,), rows.shape[0], dtype=torch.int32, device=x.device)
            y = torch.ops.grok1.int8_grouped_matmul(rows, self.weight[None], self.weight_scale[None], offsets)
        else:
            y = int8_matmul(rows, self.weight, self.weight_scale)
        return y.view(*x.shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, blocks={self.weight_scale.shape[-1]}"
        )


class Int8Experts(nn.Module):
    """
    All experts of a layer; the int8 form of modeling_grok1.Grok1Experts, which is `plain_class`.

    gate_up_proj: E 2F D, int8, gate first; gate_up_proj_scale: E 2F 1; down_proj: E D F, int8; down_proj_scale: E D G.
    """

    _hf_quantized_needs_local_tp = True
    _is_expert_parallel = False

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, blocks: int, plain_class: type[nn.Module]):
        super().__init__()
        self.num_experts = num_experts  # expert parallelism sets this rank's number
        self.plain_class = plain_class
        self.gate_up_proj, self.gate_up_proj_scale = int8_parameters(num_experts, 2 * hidden_dim, dim, blocks=1)
        self.down_proj, self.down_proj_scale = int8_parameters(num_experts, dim, hidden_dim, blocks=blocks)

    @property
    def is_transposed(self) -> bool:
        """What PEFT asks of experts before it adds floats to one of their parameters."""
        raise ValueError(
            "`target_parameters` cannot adapt fused int8 experts: load the model with `experts_layout='linear'` and "
            "name the matrices of the experts, `target_modules=['w1', 'w2', 'w3']`."
        )

    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(geglu(gate_e(x), up_e(x))); x: N D, experts and gates: N k.

        The expert number `num_experts` marks an expert of another rank, whose gate is zero.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.trainable_forward(x, experts, gates)
        if compiled_row(x):
            return self.chosen_experts_forward(x, experts, gates)
        N, k = experts.shape  # noqa: N806
        chosen, order = experts.flatten().sort(stable=True)  # S = N*k
        counts = (chosen[:, None] == torch.arange(self.num_experts, device=x.device)).sum(dim=0)
        offsets = counts.cumsum(dim=0, dtype=torch.int32)
        matmul = torch.ops.grok1.int8_grouped_matmul if torch.compiler.is_compiling() else grouped_matmul
        y = matmul(x[order // k], self.gate_up_proj, self.gate_up_proj_scale, offsets)  # S 2F
        y = matmul(geglu(*y.chunk(2, dim=-1)), self.down_proj, self.down_proj_scale, offsets)  # S D
        y = y * gates.flatten()[order, None]
        return torch.empty_like(y).index_copy_(0, order, y).view(N, k, -1).sum(dim=1)

    def chosen_experts_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `forward` for one row (x: 1 D) on a CPU under torch.compile: reads the chosen matrices in place."""
        chosen = experts[0].clamp(max=self.num_experts - 1)  # k
        y = matmul_by_reduction(x.expand(len(chosen), -1), self.gate_up_proj, chosen, self.gate_up_proj_scale)  # k 2F
        y = geglu(*y.chunk(2, dim=-1))
        return gates @ matmul_by_reduction(y, self.down_proj, chosen, self.down_proj_scale)

    def trainable_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `forward`, one expert at a time, with a gradient for x and gates."""

        def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
            y = FrozenMatmul.apply(rows, self.gate_up_proj[e], self.gate_up_proj_scale[e])
            return FrozenMatmul.apply(geglu(*y.chunk(2, dim=-1)), self.down_proj[e], self.down_proj_scale[e])

        return routed_sum(x, experts, gates, expert, self.num_experts)

    def extra_repr(self) -> str:
        E, D, hidden = self.down_proj.shape  # noqa: N806
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}, blocks={self.down_proj_scale.shape[-1]}"
