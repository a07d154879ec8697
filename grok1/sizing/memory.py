"""Memory that a model needs, computed before anything is loaded.

Measured on PyTorch's meta device, where tensors have shapes and dtypes and no data.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grok1.precision import PRECISIONS, Precision, find_precision


if TYPE_CHECKING:
    import torch

    from modeling_grok1 import Grok1ForCausalLM, GrokConfig

GIB = 2**30

# The projections of attention and experts are quantised; everything else keeps its dtype.
QUANTIZED = ("attention", "experts")
KINDS = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "self_attn.": "attention",
    "experts.": "experts",
    "block_sparse_moe.gate.weight": "router",
    "norm.weight": "norms",
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one model in one precision; see `model_memory`.

    Args:
        precision: key of `grok1.precision.PRECISIONS`.
        parameters: number of weights, a tied head counted once.
        weights: bytes by kind: embedding, head (untied only), attention, experts, router, norms.
        layers: bytes of each decoder layer's weights; the rest of `weights_bytes` is outside the layers.
        kv_bytes_per_token: keys and values of one token in all layers.
        prompt: tokens of the prompt that the activations are for.
        activations: peak bytes beside weights and cache while the prompt is processed.
    """

    precision: str
    parameters: int
    weights: dict[str, int]
    layers: tuple[int, ...]
    kv_bytes_per_token: int
    prompt: int
    activations: int

    @property
    def weights_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def outside_layers(self) -> int:
        """Bytes of embedding, head and final norm."""
        return self.weights_bytes - sum(self.layers)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache that holds `tokens` tokens (all sequences together)."""
        return tokens * self.kv_bytes_per_token


def meta_model(config: GrokConfig, dtype: str, experts_layout: str | None = None) -> Grok1ForCausalLM:
    """The model without data, in the shapes and dtypes that loading with `dtype` gives."""
    import torch

    from modeling_grok1 import Grok1ForCausalLM

    # A copy: building a model writes its dtype and its layout into the config.
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the precision is the caller's to choose, whatever the folder holds
    with torch.device("meta"):
        return Grok1ForCausalLM._from_config(config, dtype=getattr(torch, dtype), experts_layout=experts_layout).eval()


def peak_bytes(call: Callable[[], Any], given: Iterable[torch.Tensor] = ()) -> int:
    """Peak bytes of the tensors made during `call()` that are alive at one time, those of `given` not counted.

    Works on the meta device. A view costs nothing; the workspace of a kernel is not counted.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Meter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.given = {tensor.untyped_storage()._cdata for tensor in given}
            self.live: dict[int, tuple[StorageWeakRef, int]] = {}
            self.peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
                return True  # a mask asks whether the positions are those of one sequence; here they are
            if func is torch.ops.aten._grouped_mm.default and args[0].device.type == "meta":
                # Its own shape rule knows bfloat16 only.
                output = args[0].new_empty(args[0].shape[0], args[1].shape[-1])
            else:
                output = func(*args, **(kwargs or {}))
            for tensor in tree_iter(output):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.given:
                        self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.live.values()))
            return output

    meter = Meter()
    with torch.no_grad(), meter:
        call()
    return meter.peak


def layer_activations(config: GrokConfig, dtype: str, chunk: int, batch: int = 1, past: int = 0) -> tuple[int, int]:
    """Peak bytes of one layer beside weights and cache, and the bytes of that layer's cache at the end.

    Activations do not add up over layers in inference, so the peak of one layer is the model's. Eager attention,
    grouped experts, logits of the last token only.

    Args:
        config: the model's sizes.
        dtype: compute dtype.
        chunk: tokens of the prompt that are processed at once.
        batch: sequences.
        past: tokens that the cache holds before.
    """
    import torch
    from transformers import DynamicCache

    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    model = meta_model(one_layer, dtype)
    cache = DynamicCache(config=one_layer)
    if past > 0:
        shape = (batch, config.num_key_value_heads, past, config.head_dim)
        before = torch.empty(shape, dtype=model.dtype, device="meta")
        cache.update(before, before, 0)
    tokens = torch.zeros(batch, chunk, dtype=torch.long, device="meta")
    peak = peak_bytes(
        lambda: model(tokens, cache=cache, use_cache=True, logits_to_keep=1),
        given=[tokens, *model.parameters(), *model.buffers()],
    )
    layer: Any = cache.layers[0]
    cached = layer.keys.nbytes + layer.values.nbytes
    return peak - cached, cached


def dequantized_matrix(config: GrokConfig, precision: Precision) -> int:
    """Bytes of the largest matrix in the compute dtype where a product expands it first, else 0."""
    if not precision.dequantizes:
        return 0
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_dim)
    return config.hidden_size * widest * element_size(precision)


def element_size(precision: Precision) -> int:
    """Bytes of a number in the compute dtype."""
    return {"float32": 4, "bfloat16": 2}[precision.dtype]


def kind_of(name: str) -> str:
    """The key of `Memory.weights` that a parameter counts for."""
    return next(kind for part, kind in KINDS.items() if part in name)


def matrix_bytes(name: str, shape: Sequence[int], plain: int, precision: Precision) -> int:
    """Stored bytes of one parameter: `plain` of them unless the precision quantises it."""
    if precision.matrix_bytes is None or kind_of(name) not in QUANTIZED:
        return plain
    rows, columns = shape
    return precision.matrix_bytes(name, rows, columns)


def weight_bytes(parameters: Mapping[str, tuple[Sequence[int], int]], precision: Precision) -> dict[str, int]:
    """Stored bytes by kind.

    Args:
        parameters: shape, and bytes when it is not quantised, of every parameter with linear experts (one 2-D matrix
            per projection), by its name in the model.
        precision: how the matrices are stored.
    """
    weights: Counter[str] = Counter()
    for name, (shape, plain) in parameters.items():
        weights[kind_of(name)] += matrix_bytes(name, shape, plain, precision)
    return dict(weights)


def model_memory(config: GrokConfig, precision: str, prompt: int = 8192) -> Memory:
    """Measure the meta model of `config`. Nothing is allocated; it takes seconds at the released size.

    Weights are the shapes and dtypes of the parameters, with the matrices of attention and experts at the stored size
    of the precision. The KV cache is measured from a real cache. Activations are the peak on a GPU that processes a
    prompt of `prompt` tokens at once, batch 1 (`layer_activations`); a CPU needs less. Eager attention processes a
    long prompt in chunks of queries, so they grow linearly, apart from the mask. Where the precision dequantises, one
    matrix in the compute dtype is added. Not counted: rounding by the allocator, workspaces of kernels, and the
    framework itself (about 0.5 GB on a GPU).

    Args:
        config: the model's sizes.
        precision: key of `grok1.precision.PRECISIONS`.
        prompt: tokens of the prompt; at least 1.

    Raises:
        ValueError: an unknown precision, or a prompt below 1.
    """
    layout = find_precision(precision)
    if prompt < 1:
        raise ValueError(f"`prompt`: expected at least 1 token, found {prompt}.")

    # Linear experts: one parameter per matrix, as every quantised layout stores them.
    model = meta_model(config, layout.dtype, experts_layout="linear")
    parameters = {name: (weight.shape, weight.nbytes) for name, weight in model.named_parameters()}
    layers: Counter[int] = Counter()
    for name, (shape, plain) in parameters.items():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += matrix_bytes(name, shape, plain, layout)
    activations, cached = layer_activations(config, layout.dtype, prompt)
    return Memory(
        precision=precision,
        parameters=sum(weight.numel() for weight in model.parameters()),
        weights=weight_bytes(parameters, layout),
        layers=tuple(layers[i] for i in range(config.num_hidden_layers)),
        kv_bytes_per_token=cached // prompt * config.num_hidden_layers,
        prompt=prompt,
        activations=activations + dequantized_matrix(config, layout),
    )


def memory_table(config: GrokConfig, tokens: int = 8192) -> str:
    """Markdown: for each precision the weights, the KV cache at `tokens` tokens, and the activations of a prompt of
    512 and of `tokens` tokens, in GiB (2^30 bytes)."""
    lines = [
        f"| precision | weights | KV cache at {tokens:,} tokens | activations, prompt of 512 | of {tokens:,} |",
        "|---|---:|---:|---:|---:|",
    ]
    for precision in PRECISIONS:
        short, full = model_memory(config, precision, prompt=512), model_memory(config, precision, prompt=tokens)
        columns = (full.weights_bytes, full.kv_bytes(tokens), short.activations, full.activations)
        lines.append(f"| {precision} | " + " | ".join(f"{size / GIB:,.1f}" for size in columns) + " |")
    return "\n".join(lines)
