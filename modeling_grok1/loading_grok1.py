# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
How checkpoints become parameters: the names that are read, the layouts of the experts in memory, and what is refused
because it would load something wrong, or leave the experts in full precision.
"""

import os
from importlib.metadata import version


TESTED_TRANSFORMERS, FOUND_TRANSFORMERS = "5.23", version("transformers")

# Not in configuration_grok1.py: engines with a Grok-1 of their own read the configuration with other versions.
if (
    ".".join(FOUND_TRANSFORMERS.split(".")[:2]) != TESTED_TRANSFORMERS
    and os.environ.get("GROK1_UNTESTED_TRANSFORMERS") != FOUND_TRANSFORMERS  # `make test-latest`
):
    raise ImportError(
        f"Grok-1's code rests on the loading internals of transformers {TESTED_TRANSFORMERS} and found "
        f'transformers {FOUND_TRANSFORMERS}: run `pip install "transformers=={TESTED_TRANSFORMERS}.*"`, take a '
        "release of modeling-grok1 that names your version, or try it all the same with the environment variable "
        f"GROK1_UNTESTED_TRANSFORMERS={FOUND_TRANSFORMERS}."
    )

from .configuration_grok1 import GrokConfig  # isort: skip
from .pipeline_grok1 import register_text_generation  # isort: skip
from .quantization_grok1 import QUANT_METHOD  # isort: skip  (registers xAI's int8 with Transformers)

import torch
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging


register_text_generation()

logger = logging.get_logger(__name__)

# --------------------------------------------------------------------------------------------------------------------
# Names of the weights. A checkpoint holds one 2-D matrix an expert; in memory the experts of a layer are two 3-D
# parameters ("fused"), or one nn.Linear each ("linear"), which is what bitsandbytes can quantise.
# --------------------------------------------------------------------------------------------------------------------
FUSED, LINEAR = "fused", "linear"
# Transformers picks the renaming by the config's model type: the instance's value tells the layouts apart, config.json
# always says the class's.
LINEAR_MODEL_TYPE = f"{GrokConfig.model_type}-linear"
OFFLOADED_MODEL_TYPE = f"{GrokConfig.model_type}-offloaded"  # `experts_on`: no experts in the model at all


class LoadOnlyRenaming(PrefixChange):
    """Reads the names of another repository; saving writes our own.

    A `PrefixChange` is what Transformers calls a renaming that only old checkpoints need; unlike that one it is never
    reversed.
    """

    __slots__ = ()

    def __init__(self, source_patterns: str, target_patterns: str):
        WeightRenaming.__init__(self, source_patterns, target_patterns)

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(r"(?!)", "")


# Applied in this order: keyfan's `.linear.` is the output projection in attention and the gate in an expert.
ALIASES = [
    # keyfan/grok-1-hf
    (r"^transformer\.in_out_embed\.", "model.embed_tokens."),
    (r"^transformer\.rms_norm\.", "model.norm."),
    (r"^transformer\.decoder_layer\.", "model.layers."),
    (r"\.multi_head_attention\.query\.", ".self_attn.q_proj."),
    (r"\.multi_head_attention\.key\.", ".self_attn.k_proj."),
    (r"\.multi_head_attention\.value\.", ".self_attn.v_proj."),
    (r"\.multi_head_attention\.linear\.", ".self_attn.o_proj."),
    (r"\.rms_norm\.", ".pre_attn_norm."),
    (r"\.rms_norm_1\.", ".post_attn_norm."),
    (r"\.rms_norm_2\.", ".pre_moe_norm."),
    (r"\.rms_norm_3\.", ".post_moe_norm."),
    (r"\.router\.", ".block_sparse_moe.gate."),
    (r"\.moe\.", ".block_sparse_moe.experts."),
    # hpcai-tech/grok-1
    (r"\.attn\.", ".self_attn."),
    (r"\.moe_block\.", ".block_sparse_moe."),
    # both
    (r"norm\.scale$", "norm.weight"),
    (r"\.linear\.", ".w1."),
    (r"\.linear_v\.", ".w3."),
    (r"\.linear_1\.", ".w2."),
]


class StackExperts(MergeModulelist):
    """Stacks the matrices of all experts; gate and up as the two halves of one tensor, which then is their
    concatenation without being copied again."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):  # type: ignore[override]
        lists = [input_dict.get(pattern) for pattern in source_patterns]
        if len(lists) != 2 or not all(isinstance(matrices, list) and matrices for matrices in lists):
            return super().convert(input_dict, source_patterns, target_patterns)  # type: ignore[call-arg]
        (gate, up), E = (matrices[0] for matrices in lists), len(lists[0])  # noqa: N806
        whole = gate.new_empty(E, len(gate) + len(up), *gate.shape[1:])
        halves = whole.split([len(gate), len(up)], dim=1)
        for pattern, half in zip(source_patterns, halves, strict=True):
            for place, matrix in zip(half, input_dict.pop(pattern), strict=True):
                place.copy_(matrix)
        return dict(zip(source_patterns, halves, strict=True))


class JoinHalves(Concatenate):
    """A concatenation, which costs nothing after `StackExperts`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):  # type: ignore[override]
        parts = [input_dict.get(pattern) for pattern in source_patterns]
        whole = getattr(parts[0], "_base", None)
        if whole is not None and whole.ndim == parts[0].ndim:
            halves = whole.split(whole.shape[self.dim] // 2, dim=self.dim)
            if len(halves) == len(parts) and all(map(torch.Tensor.is_set_to, parts, halves)):
                return {self.get_target_pattern(target_patterns): whole}
        return super().convert(input_dict, source_patterns, target_patterns)  # type: ignore[call-arg]


def register_weight_names() -> None:
    """Tell Transformers how checkpoints are read, for both expert layouts. Idempotent."""
    aliases: list[WeightConverter | WeightRenaming] = [LoadOnlyRenaming(*pair) for pair in ALIASES]
    fuse: list[WeightConverter | WeightRenaming] = [
        WeightConverter(
            source_patterns=[".experts.*.w1.weight", ".experts.*.w3.weight"],
            target_patterns=".experts.gate_up_proj",
            operations=[StackExperts(dim=0), JoinHalves(dim=1)],
        ),
        WeightConverter(
            source_patterns=".experts.*.w2.weight",
            target_patterns=".experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]
    register_checkpoint_conversion_mapping(GrokConfig.model_type, aliases + fuse, overwrite=True)
    register_checkpoint_conversion_mapping(LINEAR_MODEL_TYPE, aliases, overwrite=True)
    register_checkpoint_conversion_mapping(OFFLOADED_MODEL_TYPE, aliases, overwrite=True)


register_weight_names()


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------
def check_parallelism(config: GrokConfig, experts_layout: str = FUSED) -> None:
    """Refuse, all in one ValueError, a `config.distributed_config` along which the weights cannot be cut."""
    distributed = getattr(config, "distributed_config", None)
    if distributed is None:
        return
    tp, ep, pp = (getattr(distributed, f"{kind}_size") or 1 for kind in ("tp", "ep", "pp"))
    cuts = [("tp_size", tp, "num_attention_heads"), ("tp_size", tp, "num_key_value_heads")]
    # Expert parallelism cuts between experts, tensor parallelism alone through each of them.
    cuts.append(("ep_size", ep, "num_experts") if ep > 1 else ("tp_size", tp, "intermediate_size"))
    problems = [
        f"`{option}`: expected a divisor of `{field}` ({getattr(config, field)}), found {size}"
        for option, size, field in cuts
        if getattr(config, field) % size != 0
    ]
    if pp > config.num_hidden_layers:
        problems.append(f"`pp_size`: expected at most `num_hidden_layers` ({config.num_hidden_layers}), found {pp}")
    if pp > 1 and max(tp, ep) > 1:
        problems.append(
            "`pp_size`: Transformers does not cut the layers of a pipeline further, leave one of the two out"
        )
    if experts_layout == LINEAR and max(tp, ep) > 1:
        problems.append(
            "`experts_layout='linear'` has no tensor- or expert-parallel plan: use the fused layout (leave "
            "`experts_layout` out), or `device_map` to spread linear experts over devices"
        )
    if problems:
        raise ValueError("This Grok-1 cannot be distributed so: " + "; ".join(problems) + ".")


# --------------------------------------------------------------------------------------------------------------------
# Other quantisations. Most look for nn.Linear and pass over 3-D parameters without a word; 98 % of the weights are
# experts.
# --------------------------------------------------------------------------------------------------------------------
QUANTIZATION_ADVICE = (
    "What reaches Grok-1's experts: Grok1Int8Config() (xAI's own int8), BitsAndBytesConfig(load_in_4bit=True), "
    "BitsAndBytesConfig(load_in_8bit=True), or TorchAoConfig(Float8WeightOnlyConfig()), without `experts_layout`."
)
EXPERT_MATRICES = (".gate_up_proj", ".down_proj", ".w1.weight", ".w2.weight", ".w3.weight")


def quantized_experts_layout(config: GrokConfig, experts_layout: str | None) -> str | None:
    """
    The layout in which `config.quantization_config` reaches the experts, `experts_layout` where there is none.

    Raises:
        ValueError: the method does not reach the experts in the layout that is asked for, or is not known to.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    method = getattr(method, "value", method)
    if method in (None, QUANT_METHOD) or quantization.get("dequantize"):
        return experts_layout
    if method == "bitsandbytes" and experts_layout != FUSED:
        return LINEAR
    if method == "torchao":
        # FqnToConfig names parameters, 3-D ones too; every other config is for each nn.Linear.
        by_name = "FqnToConfig" in str(quantization.get("quant_type"))
        return experts_layout or (FUSED if by_name else LINEAR)
    if method == "fp8" and experts_layout != LINEAR:
        return experts_layout
    if method not in ("bitsandbytes", "fp8") and experts_layout == LINEAR:
        return LINEAR
    raise ValueError(
        f"Quantisation by {method!r} is not known to reach Grok-1's experts, 98 % of the weights, in the layout "
        f"{experts_layout or FUSED!r}. {QUANTIZATION_ADVICE} Another method that replaces `nn.Linear` finds one for "
        "every expert matrix with `experts_layout='linear'`."
    )


def check_quantized_experts(model: PreTrainedModel, method: str) -> None:
    """Warn of every expert matrix that a quantisation left as it was; make the others work and keep."""
    experts = [
        (name, weight)
        for name, weight in model.named_parameters()
        if ".experts." in name and name.endswith(EXPERT_MATRICES)
    ]
    # What quantised types there are says each library; none is one of the two plain ones with a wide dtype.
    plain = [
        (name, weight)
        for name, weight in experts
        if type(weight.data) in (torch.Tensor, DTensor) and weight.is_floating_point() and weight.element_size() > 1
    ]
    if plain:
        name, weight = plain[0]
        logger.warning(
            f"Quantisation by {method!r} left {len(plain)} of {len(experts)} expert matrices in {weight.dtype} "
            f"({sum(weight.nbytes for _, weight in plain) / 1e9:.3g} GB; {name} is the first). {QUANTIZATION_ADVICE} "
            "Check what `quantization_config` skips or sends to the CPU; torchao's FqnToConfig reaches fused experts "
            r"by the name 're:.*experts\.(gate_up|down)_proj'."
        )
    no_grouped_product = model.experts_layout == FUSED and any(type(w).__name__ == "Int8Tensor" for _, w in experts)
    if no_grouped_product and model.config._experts_implementation != "eager":
        logger.warning("torchao's int8 has no grouped product: this model runs its experts one by one ('eager').")
        model.set_experts_implementation("eager")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights in the first forward pass on some CPUs, with their scales rounded
            # to bfloat16 and transposed, and what is saved or dequantised then is wrong
            # (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078).
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (mypy takes attributes of a module for tensors)
