# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Native int8: xAI's own quantised weights in memory, one byte a parameter.

    dequantised[o, i] = float32(weight[o, i]) * float32(scale[o, i // (K / G)])      then one cast to the compute dtype

Symmetric, one bfloat16 scale for each output and each of G contiguous blocks of inputs. In the release G is 8 for the
matrices that tensor parallelism cuts along their inputs (`o_proj`, and `w2` of the experts) and 1 for the others.

Letters as in modeling_grok1.py, and
    K  inputs of a matrix         G  scale blocks of a row          S  rows of a product over several experts
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cpu_grok1 import compiled_row, matmul_by_reduction


QUANT_METHOD = "grok1_int8"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT = ("w1", "w2", "w3")
# The matrices with `scale_blocks` blocks a row; all others have one.
BLOCKED = ("o_proj", "w2", "down_proj")


# --------------------------------------------------------------------------------------------------------------------
# The products. The plain ones are the reference; each fast one is tested against them.
# --------------------------------------------------------------------------------------------------------------------
# Elements that are dequantised at a time: small enough for a core's second-level cache, never a whole expert.
PIECE = 2**20
# Up to so many rows torch's int8 product is faster on a CPU than dequantising: it converts the weight once for 4 rows.
FEW_ROWS = 16


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
    rows = max(1, PIECE // weight.shape[1])
    y = x.new_empty(x.shape[0], weight.shape[0])
    for n in range(0, weight.shape[0], rows):
        y[:, n : n + rows] = F.linear(x, dequantise(weight[n : n + rows], scale[n : n + rows], x.dtype))
    return y


def packed_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """
    As `plain_matmul` for a few rows of bfloat16 on a CPU: reads the int8 once, accumulates in float32. K must be a
    multiple of 16.
    """
    S, G = x.shape[0], scale.shape[-1]  # noqa: N806
    # Torch's kernel crashes where x or the weight does not begin at a multiple of 16 bytes, and a memory-mapped weight
    # begins anywhere.
    if weight.data_ptr() % 16 != 0:
        rows = max(1, PIECE // weight.shape[1])
        pieces = zip(weight.split(rows), scale.split(rows), strict=True)
        return torch.cat([packed_matmul(x, w.clone(), s) for w, s in pieces], dim=-1)
    if G == 1:
        x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone()
        return torch.ops.aten._weight_int8pack_mm(x, weight, scale.squeeze(-1))
    # A row for each block, zero outside of it: torch's kernel knows one scale an output only.
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
    few = x.shape[0] * scale.shape[-1] <= FEW_ROWS and x.shape[1] % 16 == 0
    if few and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return packed_matmul(x, weight, scale)
    return plain_matmul(x, weight, scale)


class FrozenMatmul(torch.autograd.Function):
    """`int8_matmul` with a gradient for x, so that what lies around frozen int8 weights can be trained."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return int8_matmul(x, weight, scale)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        rows = max(1, PIECE // weight.shape[1])
        grad_x = grad.new_zeros(grad.shape[0], weight.shape[1], dtype=torch.float32)
        for n in range(0, weight.shape[0], rows):
            grad_x += grad[:, n : n + rows] @ dequantise(weight[n : n + rows], scale[n : n + rows], grad.dtype)
        return grad_x.to(grad.dtype), None, None


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """
    The rows of each expert times the transpose of its dequantised matrix.

    Args:
        x: S K, sorted by expert: rows offsets[e-1] .. offsets[e]-1 are those of expert e.
        weight: E N K, int8. scale: E N G, bfloat16. offsets: E, int32.

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


# Opaque to torch.compile, which would otherwise break the graph at the experts' offsets. A hub file runs once more for
# every folder that it is loaded from, and an operator can be defined once.
if not hasattr(torch.ops.grok1, "int8_grouped_matmul"):
    grouped_matmul_op = torch.library.custom_op(
        "grok1::int8_grouped_matmul",
        grouped_matmul,
        mutates_args=(),
    )

    @grouped_matmul_op.register_fake
    def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return x.new_empty(x.shape[0], weight.shape[1])


# --------------------------------------------------------------------------------------------------------------------
# The modules. Scales are parameters, so that they are placed, sharded and offloaded beside their weights.
# --------------------------------------------------------------------------------------------------------------------
def int8_parameters(*shape: int, blocks: int) -> tuple[nn.Parameter, nn.Parameter]:
    """An empty int8 weight (... K) and its bfloat16 scales (... G), G = `blocks`."""
    weight = nn.Parameter(torch.empty(*shape, dtype=torch.int8), requires_grad=False)
    scale = nn.Parameter(torch.empty(*shape[:-1], blocks, dtype=torch.bfloat16), requires_grad=False)
    return weight, scale


class Int8Linear(nn.Linear):
    """x @ dequantised.T; weight: out in, int8, frozen; weight_scale: out G, bfloat16. PEFT adapts every nn.Linear."""

    # Tensor parallelism hands over plain local tensors.
    _hf_quantized_needs_local_tp = True

    def __init__(self, in_features: int, out_features: int, blocks: int = 1):
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight, self.weight_scale = int8_parameters(out_features, in_features, blocks=blocks)
        self.register_parameter("bias", None)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802
        """The name by which PEFT knows a module whose floats `dequantize()` gives: DoRA takes their norms."""
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
    All experts of a layer, as modeling_grok1.Grok1Experts, which `plain_class` builds again.

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
        """What PEFT asks of experts before it wraps one of their parameters, and adds floats to it."""
        raise ValueError(
            "`target_parameters` cannot adapt fused int8 experts: load the model with `experts_layout='linear'` and "
            "name the matrices of the experts, `target_modules=['w1', 'w2', 'w3']`."
        )

    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(gelu(gate_e(x)) * up_e(x)); x: N D, experts and gates: N k.

        The expert number `num_experts` marks an expert of another rank, whose gate is zero.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            return self.trainable_forward(x, experts, gates)
        N, k = experts.shape  # noqa: N806
        if compiled_row(x):
            chosen = experts[0].clamp(max=self.num_experts - 1)  # k
            y = matmul_by_reduction(x.expand(k, -1), self.gate_up_proj, chosen, self.gate_up_proj_scale)  # k 2F
            y = matmul_by_reduction(gated(y), self.down_proj, chosen, self.down_proj_scale)  # k D
            return gates @ y

        chosen, order = experts.flatten().sort(stable=True)  # S = N*k
        counts = (chosen[:, None] == torch.arange(self.num_experts, device=x.device)).sum(dim=0)
        offsets = counts.cumsum(dim=0, dtype=torch.int32)
        matmul = torch.ops.grok1.int8_grouped_matmul if torch.compiler.is_compiling() else grouped_matmul
        y = matmul(x[order // k], self.gate_up_proj, self.gate_up_proj_scale, offsets)  # S 2F
        y = matmul(gated(y), self.down_proj, self.down_proj_scale, offsets)  # S D
        y = y * gates.flatten()[order, None]
        return torch.empty_like(y).index_copy_(0, order, y).view(N, k, -1).sum(dim=1)

    def trainable_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `forward`, expert by expert, with a gradient for x and gates."""
        output = torch.zeros_like(x)
        for e in experts.unique().tolist():
            if e == self.num_experts:
                continue
            token, slot = torch.where(experts == e)
            y = gated(FrozenMatmul.apply(x[token], self.gate_up_proj[e], self.gate_up_proj_scale[e]))
            y = FrozenMatmul.apply(y, self.down_proj[e], self.down_proj_scale[e])
            output = output.index_add(0, token, (y * gates[token, slot, None]).to(output.dtype))
        return output

    def extra_repr(self) -> str:
        E, D, hidden = self.down_proj.shape  # noqa: N806
        return f"num_experts={E}, dim={D}, hidden_dim={hidden}, blocks={self.down_proj_scale.shape[-1]}"


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """... 2F -> ... F"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


# --------------------------------------------------------------------------------------------------------------------
# Loading and saving
# --------------------------------------------------------------------------------------------------------------------
@dataclass
class Grok1Int8Config(QuantizationConfigMixin):
    """
    xAI's int8. A folder of int8 weights names it in its config.json; passed to `from_pretrained` as
    `quantization_config`, it quantises a folder of floats while loading.

    Args:
        scale_blocks (`int`): scale blocks G of a row of `o_proj` and of the experts' down projection (8 in the
            release); the other matrices have one scale a row.

    Raises:
        ValueError: `scale_blocks` is not a positive integer, or the method is another one.
    """

    scale_blocks: int = 8
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __post_init__(self):
        if isinstance(self.scale_blocks, bool) or not isinstance(self.scale_blocks, int) or self.scale_blocks < 1:
            raise ValueError(f"`scale_blocks`: expected a positive integer, found {self.scale_blocks!r}.")
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"`quant_method`: expected {QUANT_METHOD!r}, found {self.quant_method!r}.")


class Int8Quantise(ConversionOps):
    """A floating weight to its int8 weight and scales, expert by expert."""

    def __init__(self, scale_blocks: int):
        self.scale_blocks = scale_blocks

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        output = {}
        for name, value in input_dict.items():
            floats = value[0] if isinstance(value, list) else value
            module = name.removesuffix(".weight").rpartition(".")[2]
            blocks = self.scale_blocks if module in BLOCKED else 1
            experts = [quantise(matrix, blocks) for matrix in (floats if floats.ndim == 3 else floats[None])]
            weight, scale = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
            output[name] = weight if floats.ndim == 3 else weight[0]
            output[f"{name}_scale"] = scale if floats.ndim == 3 else scale[0]
        return output


class Grok1Int8Quantizer(HfQuantizer):
    """Puts int8 modules in place of Grok-1's projections and experts; embedding, norms, router and heads stay."""

    quantization_config: Grok1Int8Config
    requires_calibration = False
    # Transformers derives the conversions and the parallel plans of the scales from those of the weights.
    serialized_names = {"weight": ["weight", "weight_scale"]}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        # Transformers drops a tied head by its memory, which tensor parallelism hides.
        state_dict = model.state_dict()
        return {name: value for name, value in state_dict.items() if name not in model.all_tied_weights_keys}, {}

    def get_quantize_ops(self) -> ConversionOps:
        return Int8Quantise(self.quantization_config.scale_blocks)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        module = model.get_submodule(param_name.rpartition(".")[0])
        quantised = isinstance(module, Int8Linear | Int8Experts)
        return not self.pre_quantized and quantised and not param_name.endswith("_scale")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        blocks = self.quantization_config.scale_blocks
        config: Any = model.config
        problems = []
        for label, size in {
            "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
            "intermediate_size": config.intermediate_size,
        }.items():
            if size % blocks != 0:
                problems.append(f"`scale_blocks`: expected a divisor of {label} ({size}), found {blocks}")
        distributed = getattr(config, "distributed_config", None)
        tp_size = getattr(distributed, "tp_size", None) or 1
        if blocks % tp_size != 0:
            problems.append(
                f"`tp_size`: expected a divisor of the {blocks} scale blocks of o_proj and the experts' down "
                f"projection, found {tp_size}: each rank must hold whole blocks"
            )
        if problems:
            raise ValueError("The int8 weights cannot be loaded: " + "; ".join(problems) + ".")

        for name, module in list(model.named_modules()):
            last = name.rpartition(".")[2]
            with torch.device("meta"):
                if type(module) is nn.Linear and last in ATTENTION + EXPERT:
                    int8: nn.Module = Int8Linear(
                        module.in_features, module.out_features, blocks if last in BLOCKED else 1
                    )
                elif last == "experts" and hasattr(module, "gate_up_proj"):
                    E, D, hidden_dim = module.down_proj.shape  # noqa: N806
                    int8 = Int8Experts(E, D, hidden_dim, blocks, type(module))
                else:
                    continue
            model.set_submodule(name, int8)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        for module in model.modules():
            if isinstance(module, Int8Linear | Int8Experts):
                module.requires_grad_(False)
        if not self.pre_quantized:
            # The mapping that the floats were loaded with does not know the names of the scales.
            conversions = get_model_conversion_mapping(model, hf_quantizer=self, add_legacy=False)
            model._weight_conversions = conversions  # type: ignore[assignment]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """
        Every matrix in the model's dtype. The result is a plain model: what it saves is an ordinary folder.

        Raises:
            ValueError: another dtype is asked for, or weights are offloaded or sharded.
        """
        if dtype is not None and str(dtype).removeprefix("torch.") != str(model.dtype).removeprefix("torch."):
            raise ValueError(
                f"`dequantize`: expected the model's dtype, {model.dtype}, found {dtype}: load the model with "
                f"`from_pretrained(..., dtype={dtype})` instead."
            )
        elsewhere = [
            name
            for name, param in model.named_parameters()
            if param.device.type == "meta" or type(param.data) is not torch.Tensor
        ]
        if elsewhere:
            raise ValueError(
                f"`dequantize`: {len(elsewhere)} weights are offloaded or sharded ({elsewhere[0]} is the first): load "
                "the whole model into memory."
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, Int8Linear):
                with torch.device("meta"):
                    plain: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
                names = ["weight"]
            elif isinstance(module, Int8Experts):
                with torch.device("meta"):
                    plain = module.plain_class(model.config)
                names = ["gate_up_proj", "down_proj"]
            else:
                continue
            for key in names:
                floats = dequantise(getattr(module, key), getattr(module, f"{key}_scale"), model.dtype)
                setattr(plain, key, nn.Parameter(floats))
            model.set_submodule(name, plain.train(module.training))
        return model


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(Grok1Int8Quantizer)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(Grok1Int8Config)
