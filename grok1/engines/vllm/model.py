# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""Grok-1 for vLLM, on vLLM's own layers. Read it beside vllm/model_executor/models/mixtral.py; the formulas and their
source are those of modeling_grok1/modeling_grok1.py."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from grok1.engines.vllm.checks import check_soft_cap, checked, kernel_head_dim, modules_with_weights
from modeling_grok1.configuration_grok1 import GrokConfig


def rounded(value: float) -> float:
    """JAX multiplies in the dtype of the array: in bfloat16 the factor 78.38367176906169 is 78.5."""
    return torch.tensor(value, dtype=torch.get_default_dtype(), device="cpu").item()


@contextmanager
def kernels_of_experts() -> Iterator[None]:
    """With LoRA, vLLM chooses Triton kernels for the experts, which do not run on a CPU. Experts that are built inside
    keep the kernels of a model without LoRA if `--lora-target-modules` leaves them out."""
    vllm_config = get_current_vllm_config()
    lora_config = vllm_config.lora_config
    if lora_config is not None and "experts" not in (lora_config.target_modules or ["experts"]):
        vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora_config


class Grok1MoE(nn.Module):
    """Softmax over all experts in float32, the top k of them, not renormalised."""

    def __init__(self, config: GrokConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""):
        super().__init__()
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        with kernels_of_experts():
            self.experts = FusedMoEFactory(
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                renormalize=False,
                activation=config.hidden_act,
                router_logits_dtype=torch.float32,
                ckpt_names=("w1", "w2", "w3"),
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states, router_logits)


class Grok1Attention(nn.Module):
    """Grouped-query attention with rotary positions, computed in float32, and capped scores."""

    def __init__(
        self,
        config: GrokConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.head_dim = config.head_dim
        self.q_size = self.num_heads * self.head_dim
        self.kv_size = self.num_kv_heads * self.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            config.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            is_neox_style=True,
            dtype=torch.float32,
        )
        self.kernel_head_dim = kernel_head_dim(config.head_dim, cache_config)
        self.attn = Attention(
            self.num_heads,
            self.kernel_head_dim,
            config.attn_output_multiplier,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            logits_soft_cap=config.attn_logit_softcapping,
            prefix=f"{prefix}.attn",
        )
        check_soft_cap(self.attn)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q.float(), k.float())
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.kernel_head_dim == self.head_dim:
            attn_output = self.attn(q, k, v)
        else:
            # Zeros at the end of every head change no score, and the values' zeros are cut off again.
            extra = (0, self.kernel_head_dim - self.head_dim)
            attn_output = self.attn(
                *(F.pad(x.unflatten(-1, (-1, self.head_dim)), extra).flatten(1) for x in (q, k, v))
            )
            attn_output = attn_output.unflatten(-1, (-1, self.kernel_head_dim))[..., : self.head_dim].flatten(1)
        output, _ = self.o_proj(attn_output)
        return output


class Grok1DecoderLayer(nn.Module):
    def __init__(
        self,
        config: GrokConfig,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ):
        super().__init__()
        self.self_attn = Grok1Attention(config, cache_config, quant_config, prefix=f"{prefix}.self_attn")
        self.block_sparse_moe = Grok1MoE(config, quant_config, prefix=f"{prefix}.block_sparse_moe")
        self.pre_attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float32)
        self.post_attn_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float32)
        self.pre_moe_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float32)
        self.post_moe_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float32)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        # Not the fused addition: it would normalise a sum that is not rounded to the compute dtype yet.
        attn_output = self.self_attn(positions, self.pre_attn_norm(hidden_states))
        hidden_states = hidden_states + self.post_attn_norm(attn_output)
        moe_output = self.block_sparse_moe(self.pre_moe_norm(hidden_states))
        return hidden_states + self.post_moe_norm(moe_output)


@support_torch_compile
class Grok1Model(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: GrokConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.embedding_multiplier = rounded(config.embedding_multiplier_scale)
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: Grok1DecoderLayer(
                config, vllm_config.cache_config, vllm_config.quant_config, prefix=prefix
            ),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=torch.float32)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        return self.embed_tokens(input_ids) * self.embedding_multiplier

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors["hidden_states"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states = layer(positions, hidden_states)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states})
        return self.norm(hidden_states)


class Grok1ForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    fall_back_to_pt_during_load = False

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            # weight_name: (param_name, shard_id)
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
        }
    )
    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: GrokConfig = vllm_config.model_config.hf_config
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = Grok1Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=rounded(config.output_multiplier_scale))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        # What the first load has to bring. Later ones, such as a trainer's, may bring some of the weights.
        self.missing = modules_with_weights(config, "hub") - {"lm_head"}
        if vllm_config.load_config.load_format == "dummy" or vllm_config.parallel_config.enable_ep_weight_filter:
            self.missing.clear()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loader = AutoWeightsLoader(self)
        return loader.load_weights(checked(weights, self.config, self.missing), mapper=self.hf_to_vllm_mapper)
