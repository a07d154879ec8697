# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Grok-1 for mlx-lm. config.json names this file as `model_file`, so that `mlx_lm ... --trust-remote-code` runs a folder
as it is: float32, bfloat16, or with packed 8-bit or 4-bit weights. It needs mlx and mlx-lm only.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear, sum_gradients
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.pipeline import PipelineMixin
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float
    attn_output_multiplier: float
    attn_logit_softcapping: float
    embedding_multiplier_scale: float
    output_multiplier_scale: float
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = True
    dtype: str | None = None
    quantization: dict | None = None
    quantization_config: dict | None = None

    def __post_init__(self):
        if self.quantization is None and self.quantization_config is not None:
            self.packed_bits = packed_bits(self.quantization_config)


def packed_bits(config: dict) -> int:
    """
    Bits of a weight in a folder that compressed-tensors packed.

    Raises:
        ValueError: the folder is quantised in another way than MLX computes it.
    """
    method, container = config.get("quant_method"), config.get("format")
    if (method, container) != ("compressed-tensors", "pack-quantized"):
        raise ValueError(
            f"quantization_config: expected quant_method 'compressed-tensors' with format 'pack-quantized', found "
            f"{method!r} with format {container!r}. Use a packed folder, or an unquantised one with mlx_lm.convert -q."
        )
    groups = list(config.get("config_groups", {}).values())
    weights = [group.get("weights") or {} for group in groups]
    problems = [
        f"{key}: expected {' or '.join(map(str, allowed))}, found {value!r}"
        for scheme in weights
        for key, allowed in {
            "type": ("int",),
            "num_bits": (8, 4),
            "symmetric": (True,),
            "strategy": ("group",),
            "group_size": (32, 64, 128),
            "actorder": (None, "weight", "static"),
        }.items()
        if (value := scheme.get(key)) not in allowed
    ]
    problems += [f"input_activations: expected null in {group}" for group in groups if group.get("input_activations")]
    if len({scheme.get("num_bits") for scheme in weights}) != 1:
        problems.append(f"config_groups: expected one num_bits, found {[w.get('num_bits') for w in weights]}")
    if problems:
        raise ValueError("quantization_config: MLX does not compute this scheme. " + "; ".join(problems) + ".")
    return weights[0]["num_bits"]


class RMSNorm(nn.Module):
    """In float32 whatever the dtype of the input."""

    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        weight = self.weight.astype(mx.float32)
        return mx.fast.rms_norm(x.astype(mx.float32), weight, self.eps).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def softcap_scores(scores, multiplier, cap):
    return cap * mx.tanh(scores.astype(mx.float32) * multiplier / cap)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        dim, head_dim = args.hidden_size, args.head_dim
        self.n_heads = n_heads = args.num_attention_heads
        self.n_kv_heads = n_kv_heads = args.num_key_value_heads
        self.repeats = n_heads // n_kv_heads
        self.attn_output_multiplier = args.attn_output_multiplier
        self.attn_logit_softcapping = args.attn_logit_softcapping

        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.rope = initialize_rope(
            head_dim,
            base=args.rope_theta,
            traditional=False,
            scaling_config=args.rope_parameters,
            max_position_embeddings=args.max_position_embeddings,
        )

    def rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return self.rope(x.astype(mx.float32), offset=offset).astype(x.dtype)

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        batch, length, _ = x.shape
        queries = self.q_proj(x).reshape(batch, length, self.n_heads, -1).transpose(0, 2, 1, 3)
        keys = self.k_proj(x).reshape(batch, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        values = self.v_proj(x).reshape(batch, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)

        offset = 0 if cache is None else cache.offset
        queries, keys = self.rotate(queries, offset), self.rotate(keys, offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        # Query heads j*repeats ... (j+1)*repeats-1 share the key and value head j. A quantised cache gives tuples.
        queries = queries.reshape(batch, self.n_kv_heads, self.repeats, length, -1)
        keys, values = tree_map(lambda a: mx.expand_dims(a, 2), (keys, values))

        if quantized := hasattr(cache, "bits"):
            groups = {"group_size": cache.group_size, "bits": cache.bits}
            scores = mx.quantized_matmul(queries, *keys, transpose=True, **groups)
        else:
            scores = queries @ keys.swapaxes(-1, -2)
        scores = softcap_scores(scores, self.attn_output_multiplier, self.attn_logit_softcapping)
        if mask is not None:  # after the cap
            if mask.ndim > 3:
                mask = mx.expand_dims(mask, 2)
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        scores = mx.softmax(scores, axis=-1).astype(queries.dtype)
        output = mx.quantized_matmul(scores, *values, transpose=False, **groups) if quantized else scores @ values

        output = output.reshape(batch, self.n_heads, length, -1).transpose(0, 2, 1, 3).reshape(batch, length, -1)
        return self.o_proj(output)


@partial(mx.compile, shapeless=True)
def geglu(gate, x):
    return nn.gelu_approx(gate) * x


class GeGLU(nn.Module):
    def __call__(self, x, gate):
        return geglu(gate, x)


class Router(nn.Module):
    """Logits of the experts in float32. It has no `to_quantized`, so it stays float32 in a quantised model."""

    def __init__(self, dims: int, num_experts: int):
        super().__init__()
        self.weight = mx.zeros((num_experts, dims))

    def __call__(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32) @ self.weight.astype(mx.float32).T


class SparseMoeBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_experts_per_tok = args.num_experts_per_tok
        self.gate = Router(args.hidden_size, args.num_experts)
        self.switch_mlp = SwitchGLU(args.hidden_size, args.intermediate_size, args.num_experts, activation=GeGLU())
        self.sharding_group = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.sharding_group is not None:
            x = sum_gradients(self.sharding_group)(x)

        # Softmax over all experts; the gates of the chosen ones are not renormalised.
        gates = mx.softmax(self.gate(x), axis=-1)
        k = self.num_experts_per_tok
        inds = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
        gates = mx.take_along_axis(gates, inds, axis=-1).astype(x.dtype)

        y = self.switch_mlp(x, inds)
        y = (y * gates[..., None]).sum(axis=-2)

        if self.sharding_group is not None:
            y = mx.distributed.all_sum(y, group=self.sharding_group)
        return y


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.block_sparse_moe = SparseMoeBlock(args)
        self.pre_attn_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attn_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.pre_moe_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_moe_norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        h = x + self.post_attn_norm(self.self_attn(self.pre_attn_norm(x), mask, cache))
        return h + self.post_moe_norm(self.block_sparse_moe(self.pre_moe_norm(h)))


class Grok1Model(PipelineMixin, nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embedding_multiplier_scale = args.embedding_multiplier_scale
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        # Rounded to the compute dtype: 78.5 in bfloat16.
        h = h * mx.array(self.embedding_multiplier_scale, h.dtype)

        rank, size = self.pipeline_rank, self.pipeline_size
        if cache is None:
            cache = [None] * len(self.pipeline_layers)
        mask = create_attention_mask(h, cache[0], return_array=True)

        # Receive from the previous process in the pipeline
        if rank < size - 1:
            h = mx.distributed.recv_like(h, rank + 1)

        for layer, c in zip(self.pipeline_layers, cache, strict=True):
            h = layer(h, mask, c)

        # Send to the next process in the pipeline
        if rank != 0:
            h = mx.distributed.send(h, (rank - 1) % size)
            if cache[-1] is not None:
                cache[-1].keys = mx.depends(cache[-1].keys, h)

        # Broadcast h while keeping it in the graph
        if size > 1:
            h = mx.distributed.all_gather(h)[: h.shape[0]]

        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Grok1Model(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.model(inputs, cache, input_embeddings)
        logits = self.model.embed_tokens.as_linear(h) if self.args.tie_word_embeddings else self.lm_head(h)
        return logits * mx.array(self.args.output_multiplier_scale, logits.dtype)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """
        Weights under this model's names, from a folder of the hub or one that mlx-lm saved.

        Nothing is read here: arrays are lazy, and the experts of a layer are stacked when they are evaluated. Packed
        integers are MLX's own packing, q = value + 2^(bits-1) with the lowest bits first, so they are viewed, not
        converted: scale * value = scale * q - 2^(bits-1) * scale, and the product with a power of two is exact.

        Raises:
            ValueError: names of another layout.
        """
        if self.args.tie_word_embeddings:
            weights = {name: w for name, w in weights.items() if not name.startswith("lm_head.")}
        packed = [name.removesuffix(".weight_packed") for name in weights if name.endswith(".weight_packed")]
        if packed and self.args.dtype is not None:
            # The embedding is float32 in a packed folder. Its dtype becomes that of the activations.
            for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
                weights[name] = weights[name].astype(getattr(mx, self.args.dtype))
        for path in packed:
            weights.pop(f"{path}.weight_shape", None)
            weights[f"{path}.weight"] = weights.pop(f"{path}.weight_packed").view(mx.uint32)
            weights[f"{path}.scales"] = scales = weights.pop(f"{path}.weight_scale")
            weights[f"{path}.biases"] = scales * mx.array(-(2 ** (self.args.packed_bits - 1)), scales.dtype)
        for layer in range(self.args.num_hidden_layers):
            prefix = f"model.layers.{layer}.block_sparse_moe"
            for name, module in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
                for kind in ("weight", "scales", "biases"):
                    if f"{prefix}.experts.0.{name}.{kind}" in weights:
                        weights[f"{prefix}.switch_mlp.{module}.{kind}"] = mx.stack(
                            [weights.pop(f"{prefix}.experts.{e}.{name}.{kind}") for e in range(self.args.num_experts)]
                        )
        self._check_names(weights)
        return weights

    def _check_names(self, weights: dict[str, mx.array]) -> None:
        known = {name for name, _ in tree_flatten(self.parameters())}
        for path, module in self.named_modules():
            if hasattr(module, "to_quantized"):
                known |= {f"{path}.{name}" for name in ("scales", "biases", "global_scale")}
        if unknown := sorted(weights.keys() - known):
            raise ValueError(
                f"{len(unknown)} of {len(weights)} tensors are not in the hub layout of Grok-1, such as "
                f"{', '.join(unknown[:3])}. Expected model.embed_tokens.weight, "
                f"model.layers.N.self_attn.q_proj.weight, model.layers.N.block_sparse_moe.experts.M.w1.weight and so "
                f"on, with M below {self.args.num_experts}."
            )

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Tensor parallelism: each process holds some of the heads, and a part of every expert."""
        group = group or mx.distributed.init()
        n = group.size()
        if self.args.num_key_value_heads % n != 0:
            raise ValueError(
                f"Tensor parallelism: expected a number of processes that divides the {self.args.num_key_value_heads} "
                f"key and value heads, found {n}. Use --pipeline."
            )
        for layer in self.model.layers:
            attn, moe = layer.self_attn, layer.block_sparse_moe
            for name in ("q_proj", "k_proj", "v_proj"):
                attn[name] = shard_linear(attn[name], "all-to-sharded", group=group)
            attn.o_proj = shard_linear(attn.o_proj, "sharded-to-all", group=group)
            attn.n_heads //= n
            attn.n_kv_heads //= n

            # In place: the block sums the results.
            shard_inplace(moe.switch_mlp.gate_proj, "all-to-sharded", group=group)
            shard_inplace(moe.switch_mlp.up_proj, "all-to-sharded", group=group)
            shard_inplace(moe.switch_mlp.down_proj, "sharded-to-all", group=group)
            moe.sharding_group = group

    @property
    def cast_predicate(self):
        return lambda name: not name.endswith(("norm.weight", "block_sparse_moe.gate.weight"))

    @property
    def layers(self):
        return self.model.pipeline_layers
