# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Grok-1: a decoder of 64 layers, each with grouped-query attention and a mixture of 8 experts, 2 active per token.

    h      = embed(tokens) * embedding_multiplier
    h     += post_attn_norm(attention(pre_attn_norm(h)))                for each layer
    h     += post_moe_norm(moe(pre_moe_norm(h)))
    logits = (norm(h) @ embed.T) * output_multiplier

Source of every formula: xAI's model.py, https://github.com/xai-org/grok-1.

Letters (and V, the vocabulary):
    B  batch                       H  query heads                        E  experts of a layer
    T  tokens of this call         K  key and value heads                k  active experts per token (top_k)
    S  tokens including the cache  d  width of a head                    F  width of an expert
    D  width of the model          G  query heads per key head (H/K)     N  rows of an expert call, B*T flattened
"""

from .versions_grok1 import CACHE, cache_argument, check_arguments, check_transformers, one_cache  # isort: skip

check_transformers()  # before the imports that need the version

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import AttentionInterface, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_grok1 import causal_mask, in_pieces, paged, positions, warn_of_padding
from .configuration_grok1 import GrokConfig
from .cpu_grok1 import fast_decoding, with_cpu_products
from .experts_grok1 import ALL_EXPERTS_FUNCTIONS, FusedWeight, Grok1LinearExperts, geglu, routed_sum, without_autocast
from .loading_grok1 import FUSED, LINEAR, OFFLOADED, Grok1LoadingMixin, experts_layout, load_expert_matrices
from .losses_grok1 import causal_lm_losses
from .offloading_grok1 import Grok1OffloadedExperts, Shapes


# --------------------------------------------------------------------------------------------------------------------
# Scalars, norm, rotary embedding
# --------------------------------------------------------------------------------------------------------------------
def rounded_by_dtype(value: float) -> dict[torch.dtype, float]:
    """JAX multiplies in the array's dtype: in bfloat16 the factor 78.38367176906169 is 78.5. Exact in float64."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    return {dtype: torch.tensor(value, dtype=dtype, device="cpu").item() for dtype in dtypes}


class Grok1Embedding(nn.Embedding):
    """embed(tokens) * multiplier. The factor is inside, so that `inputs_embeds` are what the first layer reads."""

    def __init__(self, num_embeddings: int, embedding_dim: int, multiplier: float):
        super().__init__(num_embeddings, embedding_dim)
        self.multiplier = rounded_by_dtype(multiplier)

    @property
    def embed_scale(self) -> torch.Tensor:
        """The factor, under the name by which PEFT applies it to what an adapter adds to the embedding."""
        return torch.tensor(self.multiplier[self.weight.dtype], dtype=self.weight.dtype, device=self.weight.device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * self.multiplier[self.weight.dtype]


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
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]  # type: ignore[index]
        rope_parameters = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}[self.rope_type]
        inv_freq, self.attention_scaling = rope_parameters(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GrokConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """theta^(-2i/d) for i in 0..d/2-1, and the factor 1.0 on cos and sin."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0  # type: ignore[index]

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)  # B T d/2
        angle = torch.cat((angle, angle), dim=-1)  # B T d
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of each head (x: B H T d; cos, sin: B T d, float32) in float32, cast back."""
    left, right = x.float().chunk(2, dim=-1)
    rotated = torch.cat((-right, left), dim=-1)
    return (x.float() * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------------------------
def soft_cap(scores: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(scores / cap). In place, for the scores are the largest tensor of a long prompt."""
    return scores.div_(cap).tanh_() * cap


@in_pieces
def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # B H T d
    key: torch.Tensor,  # B K S d
    value: torch.Tensor,  # B K S d
    attention_mask: torch.Tensor | None,  # broadcasts to B H T S; added
    scaling: float,
    softcap: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(soft_cap(q.k * scaling) + mask) @ v -> B T H d, weights B H T S.

    The products are computed in the dtype of the query; scaling, cap, mask and softmax in float32. The G query heads
    of a group are rows of one product with their key head, so keys and values are never repeated.
    """
    (B, H, T, d), (K, S) = query.shape, key.shape[1:3]  # noqa: N806
    scores = torch.matmul(query.reshape(B, K, H // K * T, d), key.transpose(2, 3)).view(B, H, T, S)
    scores = soft_cap(scores.float() * scaling, softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1).to(query.dtype)
    output = torch.matmul(weights.view(B, K, H // K * T, S), value).view(B, H, T, d)
    return output.transpose(1, 2), weights


ALL_ATTENTION_FUNCTIONS = AttentionInterface()
ALL_ATTENTION_FUNCTIONS["paged|eager"] = paged(eager_attention_forward)  # Transformers' own drops `softcap` silently


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
        query = self.q_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H T d
        key = self.k_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B K T d
        value = self.v_proj(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)  # B K T d
        query, key = apply_rotary(query, *position_embeddings), apply_rotary(key, *position_embeddings)

        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)  # B K S d

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, softcap=self.softcap, **kwargs
        )
        return self.o_proj(output.reshape(B, T, -1)), weights


# --------------------------------------------------------------------------------------------------------------------
# Mixture of experts
# --------------------------------------------------------------------------------------------------------------------
class Grok1TopKRouter(Shapes, nn.Module):
    """softmax over all experts, then the top k, not renormalised; float32 throughout, also under autocast."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: N D -> logits N E (float32), gates N k (dtype of x), chosen experts N k."""
        with without_autocast(x):
            logits = F.linear(x.float(), self.weight.float())
        gates, experts = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits, gates.to(x.dtype), experts


@use_experts_implementation(experts_interface=ALL_EXPERTS_FUNCTIONS)
class Grok1Experts(Shapes, nn.Module):
    """All experts of a layer in two parameters; `experts_implementation` replaces `forward`."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.num_experts = config.num_experts
        E, D, hidden = config.num_experts, config.hidden_size, config.intermediate_size  # noqa: N806
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * hidden, D))  # E 2F D, gate first
        self.down_proj = nn.Parameter(torch.empty(E, D, hidden))  # E D F

    def eager_forward(self, x: torch.Tensor, experts: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """sum over the chosen e of gates[e] * down_e(geglu(gate_e(x), up_e(x))); x: N D; experts, gates: N k."""
        gate_up, down = FusedWeight(self.gate_up_proj), FusedWeight(self.down_proj)

        def expert(e: int, rows: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up(e, rows).chunk(2, dim=-1)
            return down(e, geglu(gate, up))

        return routed_sum(x, experts, gates, expert, self.num_experts)

    forward = eager_forward

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return geglu(*gate_up.chunk(2, dim=-1))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args):
        load_expert_matrices(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Grok1SparseMoeBlock(nn.Module):
    """The router and its experts, whose class depends on where their weights are: see `experts_layout`."""

    def __init__(self, config: GrokConfig):
        super().__init__()
        self.gate = Grok1TopKRouter(config)
        layouts = {FUSED: Grok1Experts, LINEAR: Grok1LinearExperts, OFFLOADED: Grok1OffloadedExperts}
        self.experts = layouts[experts_layout(config)](config)

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

    @with_cpu_products
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
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
        return hidden_states + self.post_moe_norm(self.block_sparse_moe(self.pre_moe_norm(hidden_states)))


class Grok1Head(nn.Linear):
    """Hidden states to logits. A class of its own, as bitsandbytes takes every `nn.Linear` and heads stay whole."""

    forward = with_cpu_products(nn.Linear.forward)


class Grok1PreTrainedModel(Grok1LoadingMixin, PreTrainedModel):
    """What all Grok-1 models share. Options of `from_pretrained`: see `Grok1LoadingMixin`."""

    config_class = GrokConfig
    config: GrokConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Grok1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    # Regular expressions, searched in the whole name: "gate" alone would hold `gate_up_proj` in float32 too.
    _keep_in_fp32_modules_strict = [r"block_sparse_moe\.gate", r"(pre|post)_(attn|moe)_norm", "norm"]
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

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear) and not module.weight.is_floating_point():
            return  # int8 weights come from a checkpoint only
        super()._init_weights(module)
        if isinstance(module, Grok1Experts | Grok1TopKRouter):
            for parameter in module.parameters():
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class Grok1Model(Grok1PreTrainedModel):
    """Tokens to the normed hidden states of the last layer (B T D)."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: GrokConfig, **options):
        super().__init__(config, **options)
        config = self.config
        self.embed_tokens = Grok1Embedding(config.vocab_size, config.hidden_size, config.embedding_multiplier_scale)
        self.layers = nn.ModuleList(Grok1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Grok1RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """`cache` and `past_key_values` are two names of one argument."""
        past_key_values = one_cache(past_key_values, cache, kwargs)
        check_arguments(kwargs)
        self.check_export()
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = positions(inputs_embeds, past_key_values, kwargs)
        warn_of_padding(input_ids, attention_mask, self.config.pad_token_id)
        mask = causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, position_ids)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **cache_argument(past_key_values))


class Grok1ForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    """Grok-1 with its tied head: logits B T V."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GrokConfig, **options):
        super().__init__(config, **options)
        self.model = Grok1Model(self.config, **options)
        self.lm_head = Grok1Head(config.hidden_size, config.vocab_size, bias=False)
        self.output_multiplier = rounded_by_dtype(config.output_multiplier_scale)
        self.post_init()

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden_states)
        return logits * self.output_multiplier[logits.dtype]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            labels: B T, -100 where a token is not to be predicted; gives `loss`, the mean cross entropy in nats.
            output_router_logits: gives `router_logits` (N E per layer) and `aux_loss`, the load-balancing loss, which
                `loss` contains with the weight `router_aux_loss_coef`.
            logits_to_keep: compute the logits of this number of last positions (0: all), or of the given positions.
            skip_logits: with labels, compute the loss a few rows at a time, and no `logits`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = None if skip_logits and labels is not None else self.compute_logits(hidden_states)
        router_logits = outputs.router_logits if output_router_logits else None
        loss, aux_loss = causal_lm_losses(
            self, hidden_states, logits, labels, router_logits, attention_mask, position_ids, **kwargs
        )
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **cache_argument(outputs.get(CACHE)),
        )

    def _optimize_model_for_decode(self):
        # Transformers would switch to `batched_mm`, which copies the chosen experts for every token.
        return fast_decoding(self)


__all__ = ["Grok1ForCausalLM", "Grok1Model", "Grok1PreTrainedModel"]
