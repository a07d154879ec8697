"""Models of random numbers, built on the accelerator: nothing large is read or copied."""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from modeling_grok1 import Grok1ForCausalLM, Grok1Int4Config, Grok1Int8Config, GrokConfig
from modeling_grok1.modeling_grok1 import Grok1RMSNorm, Grok1TopKRouter
from modeling_grok1.quantization_grok1 import Grok1Quantizer
from modeling_grok1.quantized_grok1 import QuantizedExperts, QuantizedLinear, outputs_and_inputs


PRECISIONS = ("bf16", "int8", "int4")


@dataclass(frozen=True)
class Sizes:
    """The released layer, or a tiny one of the same form."""

    dry: bool
    layers: dict[str, int]
    model: dict[str, int]
    group_size: int
    scale_blocks: int
    decode_batches: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    dtype: torch.dtype  # of the products that are compared

    @property
    def hidden(self) -> int:
        return self.model["hidden_size"]

    @property
    def intermediate(self) -> int:
        return self.model["intermediate_size"]

    @property
    def vocabulary(self) -> int:
        return self.model["vocab_size"]


TRUE = Sizes(
    dry=False,
    layers={"bf16": 4, "int8": 12, "int4": 20},
    model={
        "vocab_size": 131072,
        "hidden_size": 6144,
        "intermediate_size": 32768,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    group_size=128,
    scale_blocks=8,
    decode_batches=(1, 8, 32),
    prompts=(512, 2048, 8192),
    steps=20,
    dtype=torch.bfloat16,
)
TINY = Sizes(
    dry=True,
    layers={"bf16": 1, "int8": 1, "int4": 1},
    model={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    group_size=32,
    scale_blocks=2,
    decode_batches=(1, 2),
    prompts=(8, 16),
    steps=2,
    dtype=torch.float32,  # Triton's interpreter has no bfloat16
)


def grok_config(sizes: Sizes, layers: int, **changes: Any) -> GrokConfig:
    values = {**sizes.model, "num_hidden_layers": layers, **changes}
    values.setdefault("attn_output_multiplier", values["head_dim"] ** -0.5)
    values.setdefault("embedding_multiplier_scale", values["hidden_size"] ** 0.5)
    return GrokConfig(**values)


def random_grok(
    sizes: Sizes, precision: str, device: torch.device, layers: int | None = None, dtype=torch.bfloat16, **changes: Any
) -> Grok1ForCausalLM:
    """A Grok-1 in evaluation mode. `precision`: bf16 (floats of `dtype`), int8 or int4."""
    config = grok_config(sizes, layers or sizes.layers[precision], **changes)
    with torch.device("meta"):
        model = Grok1ForCausalLM(config)
    if precision != "bf16":
        int8, int4 = Grok1Int8Config(scale_blocks=sizes.scale_blocks), Grok1Int4Config(group_size=sizes.group_size)
        quantizer = Grok1Quantizer(int8 if precision == "int8" else int4, pre_quantized=True)
        quantizer._process_model_before_weight_loading(model)
    fill(model, device, dtype)
    if precision != "bf16":
        quantizer._process_model_after_weight_loading(model)
    return model


def random_mixtral(sizes: Sizes, device: torch.device) -> MixtralForCausalLM:
    """Mixtral of the same sizes in bfloat16."""
    config = MixtralConfig(
        **sizes.model,
        num_hidden_layers=sizes.layers["bf16"],
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = MixtralForCausalLM._from_config(config)
    fill(model, device, torch.bfloat16)
    return model


@torch.no_grad()
def fill(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device random weights on `device`: products keep the size of their inputs."""
    torch.manual_seed(0)
    for module in list(model.modules()):
        for name, meta in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(random_like(name, meta, module, device, dtype), requires_grad=False))
        if hasattr(module, "inv_freq"):  # rotary embeddings compute their buffers from the config
            module.__init__(module.config)  # type: ignore[misc]
            module.to(device)
    model.tie_weights()
    model.eval()


def random_like(
    name: str, meta: torch.Tensor, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    if name.endswith("_scale"):  # values of a uniform distribution have a deviation of 73 or 4.6
        assert isinstance(module, QuantizedLinear | QuantizedExperts)
        bits, inputs = module.bits, outputs_and_inputs(module.get_parameter(name.removesuffix("_scale")))[1]
        scale = torch.rand(meta.shape, device=device, dtype=torch.float32) * 0.4 + 0.8
        return (scale * inputs**-0.5 / (73 if bits == 8 else 4.6)).to(meta.dtype)
    if meta.dtype == torch.int8:
        return torch.empty(meta.shape, dtype=torch.int8, device=device).random_(-127, 128)
    if meta.dtype == torch.int32:
        return torch.empty(meta.shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31)
    kept = torch.float32 if isinstance(module, Grok1TopKRouter | Grok1RMSNorm) else dtype
    if meta.ndim == 1:  # norms
        return torch.ones(meta.shape, dtype=kept, device=device)
    return torch.empty(meta.shape, dtype=kept, device=device).normal_(std=meta.shape[-1] ** -0.5)


def release(device: torch.device) -> None:
    """Return what deleted models held to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
