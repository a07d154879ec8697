# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Grok-1: a decoder of 64 layers, each with grouped-query attention and a mixture of 8 experts of which a token visits 2.

    h      = embed(tokens) * embedding_multiplier
    h     += post_attn_norm(attention(pre_attn_norm(h)))                for each layer
    h     += post_moe_norm(moe(pre_moe_norm(h)))
    logits = (norm(h) @ embed.T) * output_multiplier

Source of every formula: xAI's model.py, https://github.com/xai-org/grok-1.

Letters:
    B  batch                      H  query heads                    E  experts of a layer
    T  tokens of this call        K  key and value heads            k  experts that a token visits (top_k)
    S  tokens in the cache too    d  width of a head                F  width of an expert
    D  width of the model         G  query heads a key head (H/K)   N  rows of an expert call, B*T tokens flattened
    V  vocabulary
"""

from .loading_grok1 import (  # isort: skip  (first: it checks the version of transformers)
    FUSED,
    LINEAR,
    LINEAR_MODEL_TYPE,
    OFFLOADED_MODEL_TYPE,
    check_parallelism,
    check_quantized_experts,
    quantized_experts_layout,
)
from .configuration_grok1 import GrokConfig  # isort: skip
from .offloading_grok1 import ExpertStore, Grok1OffloadedExperts, check_offloading  # isort: skip
from .decoding_grok1 import keep_freed_memory, one_row, projected, row_matmul, row_product  # isort: skip

import copy
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.core_model_loading import (
    WeightConverter,
)
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.integrations.accelerate import expand_device_map, load_offloaded_parameter
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import AttentionInterface, PreTrainedModel, slice_logits_to_keep
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs


# --------------------------------------------------------------------------------------------------------------------
# Scalars, norm, rotary embedding
# --------------------------------------------------------------------------------------------------------------------
def rounded_by_dtype(value: float) -> dict[torch.dtype, float]:
    """JAX multiplies in the array's dtype: in bfloat16 the factor 78.38367176906169 is 78.5. Exact in float64."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return {dtype: torch.tensor(value, dtype=dtype, device="cpu").item() for dtype in dtypes}


class Grok1Embedding(nn.Embedding):
    """embed(tokens) * multiplier. The factor lies inside, so that `inputs_embeds` are what the first layer reads."""

    def __init__(self, num_embeddings: int, embedding_dim: int, multiplier: float):
        super().__init__(num_embeddings, embedding_dim)
        self.multiplier = rounded_by_dtype(multiplier)

    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        embeds = super().forward(input_ids)
        return embeds * self.multiplier[embeds.dtype]


class Grok1RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, all in float32, cast back at the end. The weight is float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Grok1RotaryEmbedding(nn.Module):
    """cos and sin of position * theta^(-2i/d), in float32."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GrokConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """theta^(-2i/d) for i in 0..d/2-1, and the factor 1.0 on cos and sin."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # B T d/2
        angle = torch.cat((angle, angle), dim=-1)  # B T d
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head (x: B H T d; cos, sin: B T d, float32) in float32, cast back."""
    x32 = x.float()
    left, right = x32.chunk(2, dim=-1)
    rotated = torch.cat((-right, left), dim=-1)
    return (x32 * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------
# Bytes of scores at a time where a prompt is computed in pieces: what the caches of a CPU hold, a little of a GPU.
SCORE_BYTES = {"cpu": 2**21, "cuda": 2**28}


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # B H T d
    key: torch.Tensor,  # B K S d
    value: torch.Tensor,  # B K S d
    attention_mask: torch.Tensor | None,  # broadcasts to B H T S; added
    scaling: float,
    softcap: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(softcap * tanh(q.k * scaling / softcap) + mask) @ v -> (B T H d, weights B H T S).

    The scores are a product in the compute dtype; scaling, cap, mask and softmax are float32. The G query heads of a
    group are rows of one product with their key head, so the cache is never repeated.

    The scores of a whole prompt would take 36 GiB for 8,192 tokens of the release. So a long one is computed some
    queries at a time, each piece with the keys up to the last one that its mask leaves open, and the weights are None,
    unless they or gradients are asked for.
    """
    (B, H, T, _), S = query.shape, key.shape[2]  # noqa: N806
    dropout = dropout if module.training else 0.0
    wanted = kwargs.get("output_attentions", module.config.output_attentions)
    rows = max(16, SCORE_BYTES.get(query.device.type, 2**28) // (4 * B * H * S))
    if rows >= T or wanted or torch.is_grad_enabled() or torch.compiler.is_compiling():
        output, weights = attend(query, key, value, attention_mask, scaling, softcap, dropout)
        return output.transpose(1, 2), weights
    outputs = []
    for start in range(0, T, rows):
        piece, mask, seen = slice(start, start + rows), None, S
        if attention_mask is not None:
            mask = attention_mask.expand(-1, -1, T, -1)[:, :, piece]
            open_keys = mask > torch.finfo(mask.dtype).min
            # A padding token that sees no key weighs all alike. Sizes alone are measured on the meta device.
            if not mask.is_meta and open_keys.any(dim=-1).all():
                seen = int(open_keys.any(dim=(0, 1, 2)).nonzero().max()) + 1
            mask = mask[..., :seen]
        keys, values = key[:, :, :seen], value[:, :, :seen]
        outputs.append(attend(query[:, :, piece], keys, values, mask, scaling, softcap, dropout)[0])
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of `eager_attention_forward`, all at once -> B H T d, weights B H T S."""
    (B, H, T, d), (K, S) = query.shape, key.shape[1:3]  # noqa: N806
    matmul = row_product if one_row(query.reshape(B * T, -1)) else torch.matmul
    scores = matmul(query.reshape(B, K, H // K * T, d), key.transpose(2, 3))  # B K G*T S
    # In place: the scores are the largest tensor of a long prompt, and each new one costs its pages too.
    scores = torch.tanh_(scores.float().mul_(scaling / softcap)).view(B, H, T, S)
    scores = scores * softcap if mask is None else torch.add(mask, scores, alpha=softcap)
    weights = scores.softmax(dim=-1).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    output = matmul(weights.view(B, K, H // K * T, S), value)  # B K G*T d
    return output.view(B, H, T, d), weights


@torch.compiler.disable  # the paged cache is written in place, which functionalisation would copy whole
def paged_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Continuous batching. Transformers' own `paged|eager` drops `softcap` without a word."""
    cache = kwargs.pop("cache", None)
    if cache is None:
        raise ValueError("`paged|eager` attention is for continuous batching only; use `eager` for a forward pass.")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["paged|eager"] = paged_attention_forward


class Grok1Attention(nn.Module):
    """Grouped-query attention with rotary positions and capped scores."""

    def __init__(self, config: GrokConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.attn_output_multiplier
        self.softcap = config.attn_logit_softcapping
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,  # B T D
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T = hidden_states.shape[:2]  # noqa: N806
        query = projected(self.q_proj, hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H T d
        key = projected(self.k_proj, hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B K T d
        value = projected(self.v_proj, hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B K T d
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # B K S d

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, softcap=self.softcap, dropout=0.0, **kwargs
        )
        return projected(self.o_proj, output.reshape(B, T, -1)), weights


# --------------------------------------------------------------------------------------------------------------------
# Mixture of experts
# --------------------------------------------------------------------------------------------------------------------
class Grok1TopKRouter(nn.Module):
    """softmax over all experts, then the top k, not renormalised; float32 throughout, also under autocast."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: N D -> logits N E (float32), gates N k (dtype of x), chosen experts N k."""
        with maybe_autocast(device_type=x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        gates, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, gates.to(x.dtype), experts


def grouped_experts_forward(
    self: "Grok1Experts", x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """`experts_implementation="grouped_mm"`, the default: Transformers' own, where it has the dtype and is fast. On a
    CPU, whose grouped product is a loop too, what it gathers for all experts is a tenth of the time of 100 rows and a
    quarter of a long prompt's."""
    if one_row(x):
        chosen = experts[0].clamp(max=self.num_experts - 1)  # k; an expert of another rank has the gate 0
        y = row_matmul(x.expand(len(chosen), -1), self.gate_up_proj, chosen)  # k 2F
        y = row_matmul(self._apply_gate(y), self.down_proj, chosen)  # k D
        return gates @ y
    long = x.shape[0] > 96 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if long or x.dtype == torch.float64:
        return self.plain_forward(x, experts, gates)
    return ExpertsInterface()["grouped_mm"](self, x, experts, gates)


ALL_EXPERTS_FUNCTIONS = ExpertsInterface()
ALL_EXPERTS_FUNCTIONS["grouped_mm"] = grouped_experts_forward


@use_experts_implementation(experts_interface=ALL_EXPERTS_FUNCTIONS)
class Grok1Experts(nn.Module):
    """All experts of a layer in two parameters; `experts_implementation` replaces the plain loop below."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(config.num_experts, 2 * config.intermediate_size, config.hidden_size)  # E 2F D, gate first
        )
        self.down_proj = nn.Parameter(
            torch.empty(config.num_experts, config.hidden_size, config.intermediate_size)  # E D F
        )
        self.act_fn = ACT2FN[config.hidden_act]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def plain_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(gelu(gate_e(x)) * up_e(x)); x: N D, experts and gates: N k."""
        output = torch.zeros_like(x)
        gate_up_proj, down_proj = self.gate_up_proj, self.down_proj  # an adapter may compute them anew at each use
        for e in experts.unique().tolist():
            if e == self.num_experts:  # expert parallelism marks the experts of other ranks so
                continue
            token, slot = torch.where(experts == e)
            rows, gate_up = x[token], gate_up_proj[e]
            half = len(gate_up) // 2  # slices, for torchao's int8 cannot be split
            y = self.act_fn(F.linear(rows, gate_up[:half])) * F.linear(rows, gate_up[half:])
            y = F.linear(y, down_proj[e])
            output.index_add_(0, token, (y * gates[token, slot, None]).to(output.dtype))
        return output

    forward = plain_forward

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args):
        # transformers.Trainer resumes by `load_state_dict` from what `save_pretrained` wrote, one matrix an expert,
        # and would go on with the experts as they were (https://github.com/huggingface/transformers/issues/48805).
        for name, parts in {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.items():
            weight = getattr(self, name)
            matrices = {
                f"{prefix}{e}.{part}.weight": matrix
                for e in range(self.num_experts)
                for part, matrix in zip(parts, weight[e].chunk(len(parts)), strict=True)
            }
            found = [] if weight.is_meta else [key for key in matrices if key in state_dict]
            for key in found:  # those of one file, which may end within a layer
                matrices[key].copy_(state_dict.pop(key))
            if len(found) == len(matrices):
                state_dict[f"{prefix}{name}"] = weight
        super()._load_from_state_dict(state_dict, prefix, *args)


class Grok1Expert(nn.Module):
    """One expert of the linear layout: w1 is its gate, w3 its up and w2 its down projection."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return projected(self.w2, self.act_fn(projected(self.w1, x)) * projected(self.w3, x))


class Grok1LinearExperts(nn.ModuleList):
    """The experts of a layer as modules of their own: only those that are chosen are run, and read."""

    def __init__(self, config: GrokConfig):
        super().__init__(Grok1Expert(config) for _ in range(config.num_experts))

    @torch.compiler.disable(
        reason="which linear experts run is known only after the router: use `experts_layout='fused'` for a full graph"
    )
    def forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """As `Grok1Experts.forward`."""
        output = torch.zeros_like(x)
        for e in experts.unique().tolist():
            token, slot = torch.where(experts == e)
            y = self[e](x[token])
            output.index_add_(0, token, (y * gates[token, slot, None]).to(output.dtype))
        return output


class Grok1SparseMoeBlock(nn.Module):
    def __init__(self, config: GrokConfig):
        super().__init__()
        self.gate = Grok1TopKRouter(config)
        layouts = {LINEAR_MODEL_TYPE: Grok1LinearExperts, OFFLOADED_MODEL_TYPE: Grok1OffloadedExperts}
        self.experts = layouts.get(config.model_type, Grok1Experts)(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # N D
        _, gates, experts = self.gate(x)
        return self.experts(x, experts, gates).view(hidden_states.shape)


# --------------------------------------------------------------------------------------------------------------------
# The decoder
# --------------------------------------------------------------------------------------------------------------------
class Grok1DecoderLayer(GradientCheckpointingLayer):
    """Norms before and after both blocks; the outer ones are inside the residual branch."""

    def __init__(self, config: GrokConfig, layer_idx: int):
        super().__init__()
        self.pre_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Grok1Attention(config, layer_idx)
        self.post_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_sparse_moe = Grok1SparseMoeBlock(config)
        self.post_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.pre_attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.post_attn_norm(attn_output)
        moe_output = self.block_sparse_moe(self.pre_moe_norm(hidden_states))
        return hidden_states + self.post_moe_norm(moe_output)


class Grok1Head(nn.Linear):
    """Hidden states to logits. A class of its own, as bitsandbytes takes every `nn.Linear` and heads stay whole."""


class Grok1PreTrainedModel(PreTrainedModel):
    """
    What all Grok-1 models share.

    Args:
        config (`GrokConfig`): validated again here, because fields can be set after its own validation.
        experts_layout (`"fused"` or `"linear"`, *optional*): how the experts lie in memory. Fused (two 3-D parameters
            a layer) is the default; linear (an `nn.Linear` a matrix) is chosen by itself where bitsandbytes or torchao
            quantises.
            The files on disk are the same.
        experts_on (`"cpu"` or `"disk"`, *optional*): keep the experts, 99 % of the weights, in host memory or in the
            checkpoint's own files, and bring those that the router chooses to the device, where everything else is.
        expert_cache (`int` or `str`, *optional*): bytes of recently used experts that stay on the device with
            `experts_on`, such as `"40GB"` or `"40GiB"`; none by default.

    Raises:
        ValueError: the config is not a Grok-1's, an option is unknown or contradicts another, or the weights cannot be
            cut along `config.distributed_config`.
    """

    config_class = GrokConfig
    config: GrokConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Grok1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    # Regular expressions, searched in the whole name: "gate" alone would hold `gate_up_proj` in float32 too.
    _keep_in_fp32_modules_strict = [
        *(r"block_sparse_moe\.gate", "norm"),
        *("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"),
    ]
    _supports_flash_attn = True
    _supports_sdpa = False
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Grok1TopKRouter, index=0),
        "hidden_states": Grok1DecoderLayer,
        "attentions": Grok1Attention,
    }

    def __init__(
        self,
        config: GrokConfig,
        experts_layout: str | None = None,
        experts_on: str | None = None,
        expert_cache: int | str | None = None,
    ):
        config.validate()
        if config._attn_implementation == "vllm":
            raise ValueError(
                "vLLM's Transformers backend computes SiLU in every expert, where Grok-1 has GELU: use vLLM 0.24.0, "
                "the last one with a Grok-1 of its own."
            )
        if experts_layout not in (None, FUSED, LINEAR):
            raise ValueError(f"`experts_layout`: expected {FUSED!r} or {LINEAR!r}, found {experts_layout!r}.")
        cache_bytes = check_offloading(config, experts_layout, experts_on, expert_cache)
        experts_layout = quantized_experts_layout(config, experts_layout)
        model_type = LINEAR_MODEL_TYPE if experts_layout == LINEAR else type(config).model_type
        if experts_on is not None:
            experts_layout, model_type = LINEAR, OFFLOADED_MODEL_TYPE
        if config.model_type != model_type:
            config = copy.copy(config)  # the caller's may serve models of the other layout
            config.model_type = model_type
        super().__init__(config)
        self.experts_layout = experts_layout or FUSED
        self.experts_on, self.expert_cache = experts_on, cache_bytes
        if experts_on is not None:
            self._keys_to_ignore_on_load_unexpected = [
                *(self._keys_to_ignore_on_load_unexpected or []),
                r"block_sparse_moe\.experts\.",
            ]
        check_parallelism(config, self.experts_layout)
        if self.experts_layout == LINEAR:
            self._can_compile_fullgraph = False  # which experts run is known only after the router

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # The one place that knows the files of the checkpoint and the names in them. Adapters come here too, with the
        # keys that they expect.
        if model.experts_on is not None and expected_keys is None:
            model.expert_store = ExpertStore.open(
                model.config, checkpoint_files, load_config, model.experts_on, model.expert_cache
            )
            for layer_idx, layer in enumerate(model.base_model.layers):
                layer.block_sparse_moe.experts.store = model.expert_store
                layer.block_sparse_moe.experts.layer_idx = layer_idx
        loading_info, offload_index = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        if expected_keys is None and model.experts_layout == LINEAR and model.experts_on is None:
            fused = sorted(key for key in loading_info.unexpected_keys if key.endswith(".experts.gate_up_proj"))
            if fused:
                raise ValueError(
                    "`experts_layout='linear'` reads a matrix an expert, and "
                    f"{load_config.pretrained_model_name_or_path!r} holds fused experts (`{fused[0]}`): load it with "
                    "`experts_layout='fused'` and save it, which writes a matrix an expert."
                )
        scales = sorted(key for key in loading_info.unexpected_keys if key.endswith("_scale"))
        if expected_keys is None and scales and load_config.hf_quantizer is None:
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path!r} holds int8 weights with scales (`{scales[0]}`), and "
                "no quantization_config was used to read them: leave `quantization_config=None` out, or restore the "
                "one in config.json."
            )
        quantization = getattr(load_config.hf_quantizer, "quantization_config", None)
        if expected_keys is None and quantization is not None and not getattr(quantization, "dequantize", False):
            check_quantized_experts(model, str(getattr(quantization.quant_method, "value", quantization.quant_method)))
        if expected_keys is None and load_config.hf_quantizer is None:
            # Transformers keeps the conversions that this checkpoint needed. Saving separates the experts whatever
            # was loaded.
            model._weight_conversions = [
                conversion
                for conversion in load_config.weight_mapping
                if conversion.was_used() or isinstance(conversion, WeightConverter)
            ]
        return loading_info, offload_index

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs):
        """As in Transformers. Raises ValueError with `experts_on`: the experts are not in the model."""
        if self.experts_on is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"`experts_on={self.experts_on!r}` left the experts in {self.name_or_path!r}, so this model is not "
                "whole and cannot be saved: copy that folder, or load it without `experts_on` and save."
            )
        stage = getattr(self, "_pp_stage", None)
        if stage is not None:
            # Transformers would write the layers of the first stage as if they were the model.
            if getattr(self, "hf_quantizer", None) is not None:
                raise ValueError("A quantised model is not saved from a pipeline: load it without `pp_size` and save.")
            here = {name: tensor.cpu() for name, tensor in (state_dict or self.state_dict()).items()}
            stages = [here] * stage.pp_size if stage.pp_is_first_stage else None
            torch.distributed.gather_object(here, stages, group=stage.pp_group, group_dst=0)
            state_dict = {name: tensor for part in stages or [here] for name, tensor in part.items()}
        if self.experts_layout == LINEAR:
            # In memory as on disk: nothing to revert, and Transformers cannot revert a quantised model that it loaded.
            kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """As in Transformers: the model with plain weights in `dtype`, by default the dtype that it was loaded in."""
        if dtype is None and isinstance(self.config.dtype, str):
            dtype = getattr(torch, self.config.dtype)  # saving leaves the name of the dtype in the config
        return super().dequantize(dtype)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            return  # int8 weights come from a checkpoint only
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Grok1Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Grok1TopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        raise ValueError(
            "Grok-1 caps its attention scores with 30 * tanh(s / 30), which `attn_implementation='sdpa'` cannot "
            "compute: use 'eager' (the default), 'flex_attention' or 'flash_attention_2'."
        )


class Grok1Model(Grok1PreTrainedModel):
    """Tokens to the normed hidden states of the last layer (B T D)."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        super().__init__(config, **options)
        config = self.config
        self.vocab_size = config.vocab_size
        self.embed_tokens = Grok1Embedding(config.vocab_size, config.hidden_size, config.embedding_multiplier_scale)
        self.layers = nn.ModuleList(Grok1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Grok1RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        keep_freed_memory()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class Grok1ForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    """Grok-1 with its tied head: logits B T V."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GrokConfig, **options):
        super().__init__(config, **options)
        self.model = Grok1Model(self.config, **options)
        self.vocab_size = config.vocab_size
        self.lm_head = Grok1Head(config.hidden_size, config.vocab_size, bias=False)
        self.output_multiplier = rounded_by_dtype(config.output_multiplier_scale)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            labels: B T, -100 where a token is not to be predicted; gives `loss`, the mean cross entropy in nats.
            output_router_logits: gives `router_logits` (a tensor N E a layer) and `aux_loss`, the load-balancing loss
                of Switch Transformer (https://huggingface.co/papers/2101.03961, equations 4 to 6), which is added to
                `loss` with the weight `router_aux_loss_coef`.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of the given ones.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs: MoeModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = projected(self.lm_head, hidden_states)
        logits = logits * self.output_multiplier[logits.dtype]

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, self.config.num_experts, self.config.num_experts_per_tok, attention_mask
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Here the device map is final and no weight is read yet.
        head, embedding = next(iter(Grok1ForCausalLM._tied_weights_keys.items()))
        devices = expand_device_map(load_config.device_map, [head, embedding])
        if model.config.tie_word_embeddings and devices[head] != devices[embedding]:
            raise ValueError(
                f"`device_map` puts `{embedding}` on {devices[embedding]!r} and `{head}` on {devices[head]!r}, but "
                "they are one tensor (`tie_word_embeddings`): give both the same device."
            )
        return Grok1PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    @contextmanager
    def _optimize_model_for_decode(self):
        # Transformers would switch to `batched_mm`, which copies the chosen experts for every token: 2.4 GB a token
        # and layer at the released size.
        yield

    def save_pretrained(self, save_directory, *args, state_dict: dict | None = None, **kwargs):
        """As in Transformers, with `lm_head.weight` written although it is tied: some engines never tie."""
        whole = not getattr(self, "_hf_peft_config_loaded", False) and not kwargs.get("distributed_checkpoint", False)
        if whole and self.config.tie_word_embeddings:
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            embedding = state_dict.get("model.embed_tokens.weight")
            if embedding is not None:
                if embedding.device.type == "meta":
                    embedding = load_offloaded_parameter(self, "model.embed_tokens.weight")
                state_dict["lm_head.weight"] = embedding.clone()
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


# The generic heads build their base model through AutoModel, which neither knows `experts_layout` nor, in a folder
# with remote code, this class: each builds it here instead.
class Grok1ForSequenceClassification(GenericForSequenceClassification, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.num_labels = config.num_labels
        self.model = Grok1Model(self.config, **options)
        self.score = Grok1Head(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class Grok1ForTokenClassification(GenericForTokenClassification, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.num_labels = config.num_labels
        self.model = Grok1Model(self.config, **options)
        self.dropout = nn.Dropout(getattr(config, "classifier_dropout", None) or 0.1)
        self.score = Grok1Head(config.hidden_size, config.num_labels)
        self.post_init()


class Grok1ForQuestionAnswering(GenericForQuestionAnswering, Grok1PreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        Grok1PreTrainedModel.__init__(self, config, **options)
        self.model = Grok1Model(self.config, **options)
        self.qa_outputs = Grok1Head(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "Grok1ForCausalLM",
    "Grok1ForQuestionAnswering",
    "Grok1ForSequenceClassification",
    "Grok1ForTokenClassification",
    "Grok1Model",
    "Grok1PreTrainedModel",
]
