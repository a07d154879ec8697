"""What a model needs in memory, told before anything is loaded: measured on PyTorch's meta device, where tensors have
shapes and dtypes and no data."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

    from modeling_grok1 import Grok1ForCausalLM, GrokConfig

GIB = 2**30

# Matrices of the quantised layouts: the projections of attention and experts. Everything else stays as it is.
QUANTIZED = ("attention", "experts")
KINDS = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "self_attn.": "attention",
    "experts.": "experts",
    "block_sparse_moe.gate.weight": "router",
    "norm.weight": "norms",
}
# xAI's scale blocks: eight along the input of the two projections back into the residual stream, else one.
INT8_BLOCKS = {"o_proj": 8, "w2": 8}


def int8_bytes(name: str, rows: int, columns: int) -> int:
    """xAI's own: a byte a weight, a bfloat16 scale for every row and scale block."""
    return rows * columns + 2 * rows * INT8_BLOCKS.get(name.split(".")[-2], 1)


def bnb_int8_bytes(name: str, rows: int, columns: int) -> int:
    """LLM.int8(): a byte a weight, a float32 scale a row (bitsandbytes `Linear8bitLt`)."""
    return rows * columns + 4 * rows


def bnb_4bit_bytes(name: str, rows: int, columns: int) -> int:
    """Half a byte a weight, a float32 maximum for 64 weights, 16 values of the code (bitsandbytes `QuantState`)."""
    blocks = math.ceil(rows * columns / 64)
    return math.ceil(rows * columns / 2) + 4 * blocks + 16 * 4


def bnb_4bit_double_bytes(name: str, rows: int, columns: int) -> int:
    """As `bnb_4bit_bytes` with the maxima in 8 bits: a float32 scale for 256 of them, their code and their mean."""
    blocks = math.ceil(rows * columns / 64)
    return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + 256 * 4 + 4 + 16 * 4


@dataclass(frozen=True)
class Precision:
    """How the matrices are stored and in which dtype the model computes.

    Args:
        dtype: name of the compute dtype; also that of the embedding, the head, the KV cache and the activations.
        matrix_bytes: bytes of one attention or expert matrix from its name, rows and columns; None: `dtype`'s.
        dequantizes: the matrix of a call is turned into `dtype` whole before the product.
    """

    dtype: str
    matrix_bytes: Callable[[str, int, int], int] | None = None
    dequantizes: bool = False


PRECISIONS = {
    "float32": Precision("float32"),
    "bfloat16": Precision("bfloat16"),
    "int8": Precision("bfloat16", int8_bytes),
    "int8-bnb": Precision("bfloat16", bnb_int8_bytes),
    "nf4": Precision("bfloat16", bnb_4bit_bytes, dequantizes=True),
    "nf4-double": Precision("bfloat16", bnb_4bit_double_bytes, dequantizes=True),
    "fp4": Precision("bfloat16", bnb_4bit_bytes, dequantizes=True),
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one model in one precision; see `model_memory`.

    Args:
        precision: key of `PRECISIONS`.
        parameters: number of weights, a tied head counted once.
        weights: bytes by kind: embedding, head (untied only), attention, experts, router, norms.
        layers: bytes of each decoder layer's weights; what is left of `weights_bytes` lies outside the layers.
        largest_matrix: bytes of the largest single stored matrix (one expert's projection).
        kv_bytes_per_token: keys and values of one token in all layers.
        prompt: tokens of the prompt that the activations are for.
        activations: most bytes that live beside weights and cache while the prompt is read.
    """

    precision: str
    parameters: int
    weights: dict[str, int]
    layers: tuple[int, ...]
    largest_matrix: int
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

    def total_bytes(self, tokens: int) -> int:
        """Weights, cache for `tokens` tokens, and the activations of a prompt of `self.prompt` tokens."""
        return self.weights_bytes + self.kv_bytes(tokens) + self.activations


def meta_model(config: "GrokConfig", dtype: str, experts_layout: str | None = None) -> "Grok1ForCausalLM":
    """The model without data, in the shapes and dtypes that loading with `dtype` gives."""
    import torch

    from modeling_grok1 import Grok1ForCausalLM

    # A copy: building a model writes its dtype and its layout into the config.
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the precision is the caller's to choose, whatever the folder holds
    with torch.device("meta"):
        return Grok1ForCausalLM._from_config(config, dtype=getattr(torch, dtype), experts_layout=experts_layout).eval()


def peak_bytes(call: Callable[[], Any], given: Iterable["torch.Tensor"] = ()) -> int:
    """Most bytes that tensors made during `call()` hold at one time, those of `given` not counted.

    Works on the meta device. A view costs nothing; what a kernel takes inside itself is not seen.
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
            if func is torch.ops.aten._grouped_mm.default and args[0].device.type == "meta":
                # Its own rule for shapes knows bfloat16 only.
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


def model_memory(config: "GrokConfig", precision: str, prompt: int = 8192) -> Memory:
    """Measure the meta model of `config`; nothing is allocated, seconds at the released size.

    Weights: the shapes and dtypes of its parameters, with the matrices of attention and experts by the element sizes
    of the quantised layout. KV cache: the tensors of a real cache. Activations: the peak of all tensors alive at one
    time, beside weights and cache, while a GPU reads a prompt of `prompt` tokens in one piece: batch 1, eager
    attention, grouped experts, logits of the last token only (as `generate` does). A CPU holds less: its pieces of
    attention are smaller, and its experts run one by one. Eager attention computes a long prompt some queries at a
    time, so this grows with the prompt, and not with its square but for the mask. Where the precision dequantises,
    one matrix in the compute dtype is added. Not in it: the allocator's rounding, the workspaces of kernels, and the
    framework itself (about half a GiB on a GPU).

    Args:
        config: the model's sizes.
        precision: key of `PRECISIONS`.
        prompt: tokens of the prompt; at least 1.

    Raises:
        ValueError: an unknown precision, or a prompt below 1.
    """
    import torch
    from transformers import DynamicCache

    if precision not in PRECISIONS:
        raise ValueError(f"`precision`: expected one of {', '.join(PRECISIONS)}, found {precision!r}.")
    if prompt < 1:
        raise ValueError(f"`prompt`: expected at least 1 token, found {prompt}.")
    layout = PRECISIONS[precision]

    # Linear experts: one parameter a matrix, as every quantised layout stores them.
    model = meta_model(config, layout.dtype, experts_layout="linear")
    weights: Counter[str] = Counter()
    layers: Counter[int] = Counter()
    parameters = largest = largest_unpacked = 0
    for name, weight in model.named_parameters():
        kind = next(kind for part, kind in KINDS.items() if part in name)
        size = weight.nbytes
        if kind in QUANTIZED:
            largest_unpacked = max(largest_unpacked, size)
            if layout.matrix_bytes is not None:
                size = layout.matrix_bytes(name, *weight.shape)
            largest = max(largest, size)
        weights[kind] += size
        parameters += weight.numel()
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += size

    # Activations do not add up over layers in inference: one layer has the peak. It holds that layer's cache too.
    one_layer = copy.deepcopy(config)
    one_layer.num_hidden_layers = 1
    model = meta_model(one_layer, layout.dtype)
    tokens = torch.zeros(1, prompt, dtype=torch.long, device="meta")
    cache = DynamicCache(config=one_layer)
    activations = peak_bytes(
        lambda: model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1),
        given=[tokens, *model.parameters(), *model.buffers()],
    )
    layer: Any = cache.layers[0]
    cached = layer.keys.nbytes + layer.values.nbytes
    activations -= cached
    if layout.dequantizes:
        activations += largest_unpacked

    return Memory(
        precision=precision,
        parameters=parameters,
        weights=dict(weights),
        layers=tuple(layers[i] for i in range(config.num_hidden_layers)),
        largest_matrix=largest,
        kv_bytes_per_token=cached // prompt * config.num_hidden_layers,
        prompt=prompt,
        activations=activations,
    )


def memory_table(config: "GrokConfig", tokens: int = 8192) -> str:
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


if __name__ == "__main__":
    from modeling_grok1 import GrokConfig

    print(memory_table(GrokConfig()))
