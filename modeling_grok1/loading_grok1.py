# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
How checkpoints become parameters: the names that are read, the layouts of the experts in memory, and what is refused
because it would load something wrong, or leave the experts in full precision.
"""

import copy
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import conversion_mapping
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.integrations.accelerate import expand_device_map, load_offloaded_parameter
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration_grok1 import MLX_FILE, PREPARE_CONFIG, GrokConfig
from .experts_grok1 import DEFAULT_EXPERTS
from .offloading_grok1 import ExpertStore, check_offloading
from .pipeline_grok1 import register_text_generation
from .quantization_grok1 import INT4, INT8, Grok1Quantizer, own_config, quantization_method


register_text_generation()

logger = logging.get_logger(__name__)

# --------------------------------------------------------------------------------------------------------------------
# Layouts of the experts and names of the weights. A checkpoint holds one 2-D matrix per expert. In memory the experts
# of a layer are two 3-D parameters ("fused"), or one nn.Linear per matrix ("linear"), which is what bitsandbytes can
# quantise, or not in the model at all (`experts_on`).
#
# Transformers chooses the renaming of a checkpoint by `model.config.model_type`. So the model sets it on the instance
# of its config; `to_dict`, and with it config.json, writes the class's "grok-1" for all of them.
# --------------------------------------------------------------------------------------------------------------------
FUSED, LINEAR, OFFLOADED = "fused", "linear", "offloaded"
MODEL_TYPES = {layout: f"{GrokConfig.model_type}-{layout}" for layout in (LINEAR, OFFLOADED)}
MODEL_TYPES[FUSED] = GrokConfig.model_type


def experts_layout(config: GrokConfig) -> str:
    """The layout of the experts in memory that the model chose for this config."""
    return next((layout for layout, name in MODEL_TYPES.items() if name == config.model_type), FUSED)


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
    # AutoRound, from linear experts
    (r"\.gate_proj\.", ".w1."),
    (r"\.up_proj\.", ".w3."),
    (r"\.down_proj\.", ".w2."),
]


class MergeExperts(MergeModulelist):
    """Stacks the matrices of all experts."""

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts(self.dim)


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

    @property
    def reverse_op(self) -> ConversionOps:
        return UnstackExperts(self.dim)


class UnstackExperts(SplitModulelist):
    """The reverse: one tensor per expert. Up to 5.22 Transformers' own squeezes every dimension of size 1, those of
    scales too."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):  # type: ignore[override]
        output: dict[str, torch.Tensor] = {}
        for source, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            targets = self.get_target_patterns(input_dict, source, target_patterns, tensor.size(self.dim))
            output.update(zip(targets, tensor.unbind(self.dim), strict=True))
        return output


class JoinHalves(Concatenate):
    """A concatenation, which costs nothing after `StackExperts`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):  # type: ignore[override]
        parts = [input_dict.get(pattern) for pattern in source_patterns]
        whole = getattr(parts[0], "_base", None)
        if whole is not None and whole.ndim == parts[0].ndim and not whole.is_meta:
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
            operations=[MergeExperts(dim=0)],
        ),
    ]
    for layout, model_type in MODEL_TYPES.items():
        conversions = aliases + fuse if layout == FUSED else aliases
        register_checkpoint_conversion_mapping(model_type, conversions, overwrite=True)


register_weight_names()


def register_class_names() -> None:
    """
    Enter the classes in Transformers' tables of class names, which the Auto classes do not fill. The Trainer shifts
    the labels of smoothed losses, and model cards name a task, for the classes in these tables only. Idempotent.
    """
    for head in ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        table = "_".join(re.findall("LM|[A-Z][a-z]+", head)).upper()
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        names[GrokConfig.model_type] = f"Grok1For{head}"


register_class_names()


def register_adapter_names() -> None:
    """
    Enter the fused experts in the table by which PEFT finds fused experts: `target_modules="all-linear"`, or the names
    w1, w2 and w3, reach them then, as in Mixtral. PEFT copies the table when it first adapts a model. Idempotent.
    """
    copied = sys.modules.get("peft.utils.transformers_weight_conversion")
    for module in (conversion_mapping, copied):
        getattr(module, "_MODEL_TO_CONVERSION_PATTERN", {})[MODEL_TYPES[FUSED]] = "mixtral"


register_adapter_names()


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
# Other quantisations. Most look for nn.Linear and skip 3-D parameters silently; 98 % of the weights are
# experts.
# --------------------------------------------------------------------------------------------------------------------
QUANTIZATION_ADVICE = (
    "What reaches Grok-1's experts: Grok1Int8Config() (xAI's own int8), Grok1Int4Config(), "
    "BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(load_in_8bit=True), or "
    "TorchAoConfig(Float8WeightOnlyConfig()), without `experts_layout`."
)
EXPERT_MATRICES = (".gate_up_proj", ".down_proj", ".w1.weight", ".w2.weight", ".w3.weight")


def default_experts_layout() -> str:
    """
    Fused, but linear inside Accelerate's `init_empty_weights`: `load_checkpoint_and_dispatch` sets one tensor of the
    files after the other, by its name, and skips the names that the model does not have.
    """
    return LINEAR if nn.Module.register_parameter.__module__.startswith("accelerate.") else FUSED


def quantized_experts_layout(config: GrokConfig, experts_layout: str | None) -> str | None:
    """
    The layout in which `config.quantization_config` reaches the experts, `experts_layout` where there is none.

    Raises:
        ValueError: the method does not reach the experts in the layout that is asked for, or is not known to.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    method = quantization_method(config)
    if method in (None, INT8, INT4) or quantization.get("dequantize"):
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


# --------------------------------------------------------------------------------------------------------------------
# What was loaded
# --------------------------------------------------------------------------------------------------------------------
def check_loaded(model: Any, loading_info: Any, load_config: Any) -> None:
    """
    Raises:
        ValueError: the checkpoint lacks weights of the decoder, or holds them in a form that was not read.
            Transformers would warn and continue with random ones.
    """
    source = load_config.pretrained_model_name_or_path
    unexpected = sorted(loading_info.unexpected_keys)
    fused = [key for key in unexpected if key.endswith(".experts.gate_up_proj")]
    if fused and experts_layout(model.config) == LINEAR:
        raise ValueError(
            f"`experts_layout='linear'` reads one matrix per expert, and {source!r} holds fused experts "
            f"(`{fused[0]}`): load it with `experts_layout='fused'` and save it, which writes one matrix per expert."
        )
    scales = [key for key in unexpected if key.endswith("_scale")]
    if scales and load_config.hf_quantizer is None:
        raise ValueError(
            f"{source!r} holds quantised weights with scales (`{scales[0]}`), and no quantization_config was used to "
            "read them: leave `quantization_config=None` out, or restore the one in config.json."
        )
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    prefix = f"{model.base_model_prefix}." if model is not model.base_model else ""
    missing = sorted(
        key for key in loading_info.missing_keys if key not in tied and key.startswith((prefix, "lm_head."))
    )
    if missing:
        shown = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        surplus = f" It holds {len(unexpected)} unknown names; the first is {unexpected[0]}." if unexpected else ""
        raise ValueError(
            f"{source!r} lacks {len(missing)} weights of this Grok-1: {shown}.{surplus} Complete the folder, or write "
            "it again with `grok1 convert`."
        )


@torch.no_grad()
def load_expert_matrices(experts: Any, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
    """
    Let `load_state_dict` read one matrix per expert, as `save_pretrained` writes them, into fused experts: those in
    `state_dict` are copied, and replaced by the fused parameters where they are complete. Parameters on the meta
    device are replaced by real ones with the dtype and device of what is read, as `assign=True` does.

    transformers.Trainer resumes so, and would keep the experts as they are
    (https://github.com/huggingface/transformers/issues/48805).
    """
    for name, parts in {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.items():
        weight = getattr(experts, name)
        keys = [[f"{prefix}{e}.{part}.weight" for part in parts] for e in range(experts.num_experts)]
        found = [key for row in keys for key in row if key in state_dict]
        if not found:
            continue
        if weight.ndim != 3:  # cut by ZeRO-3, whose loader brings whole parameters
            continue
        if weight.is_meta:  # to be assigned; what no file brings stays NaN
            like = state_dict[found[0]]
            values = torch.full(weight.shape, float("nan"), dtype=like.dtype, device=like.device)
            weight = nn.Parameter(values, requires_grad=weight.requires_grad)
            setattr(experts, name, weight)
        for row, matrix in zip(keys, weight, strict=True):
            for key, part in zip(row, matrix.chunk(len(parts)), strict=True):
                if key in state_dict:  # a file may end within a layer
                    part.copy_(state_dict.pop(key))
        if len(found) == experts.num_experts * len(parts):
            state_dict[f"{prefix}{name}"] = weight


# --------------------------------------------------------------------------------------------------------------------
# The mixin
# --------------------------------------------------------------------------------------------------------------------
class Grok1LoadingMixin:
    """
    Options, loading and saving of all Grok-1 models. The options are keyword arguments of `from_pretrained` and
    `from_config` and are not stored in config.json.

    Args:
        config (`GrokConfig`): validated again here, because fields can be set after its own validation.
        experts_layout (`"fused"` or `"linear"`, *optional*): the experts in memory. Fused (two 3-D parameters per
            layer) is the default; linear (one `nn.Linear` per matrix) is chosen automatically where bitsandbytes or
            torchao quantises, and inside Accelerate's `init_empty_weights`. The files on disk are the same.
        experts_on (`"cpu"` or `"disk"`, *optional*): keep the experts, 99 % of the weights, in host memory or in the
            checkpoint's own files, and copy those that the router chooses to the device of everything else.
        expert_cache (`int` or `str`, *optional*): bytes of recently used experts that stay on the device with
            `experts_on`, such as `"40GB"` or `"40GiB"`; none by default.

    Raises:
        ValueError: the config is not that of a Grok-1, an option is unknown or contradicts another, or the weights
            cannot be cut along `config.distributed_config`.
    """

    _keys_to_ignore_on_load_unexpected: list[str] | None

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
                "vLLM's Transformers backend computes SiLU in every expert, where Grok-1 has GELU. Install this "
                "package beside vLLM (`pip install modeling-grok1`): its plugin serves Grok-1 with vLLM's own layers."
            )
        if experts_layout not in (None, FUSED, LINEAR):
            raise ValueError(f"`experts_layout`: expected {FUSED!r} or {LINEAR!r}, found {experts_layout!r}.")
        cache_bytes = check_offloading(config, experts_layout, experts_on, expert_cache)
        layout = quantized_experts_layout(config, experts_layout) or default_experts_layout()
        model_type = MODEL_TYPES[layout if experts_on is None else OFFLOADED]
        if config.model_type != model_type:
            config = copy.copy(config)  # the caller's may serve models of another layout
            config.model_type = model_type  # type: ignore[misc]  # on the instance
        super().__init__(config)  # type: ignore[call-arg]
        self.experts_layout = layout if experts_on is None else LINEAR
        self.experts_on, self.expert_cache = experts_on, cache_bytes
        if experts_on is not None:
            ignored = self._keys_to_ignore_on_load_unexpected or []
            self._keys_to_ignore_on_load_unexpected = [*ignored, r"block_sparse_moe\.experts\."]
        check_parallelism(config, self.experts_layout)
        if self.experts_layout == LINEAR:
            self._can_compile_fullgraph = False  # which experts run is known only after the router

    def __setattr__(self, name: str, value: Any) -> None:
        """As in PyTorch. An adapter is merged into the weight below it, so what is adapted gets one of its own."""
        if name in ("embed_tokens", "lm_head") and hasattr(value, "base_layer"):
            untie(self.config, value.base_layer)  # type: ignore[attr-defined]
        super().__setattr__(name, value)

    def check_export(self) -> None:
        """
        Raises:
            ValueError: torch.export is about to trace experts that are chosen one by one, which it cannot trace.
        """
        if not torch.compiler.is_exporting():
            return
        if self.experts_on is not None or self.experts_layout != FUSED:
            raise ValueError(
                "torch.export cannot trace experts that are chosen one by one: load without `experts_layout` "
                "and `experts_on`, which gives fused experts."
            )
        if self.config._experts_implementation == "eager":  # type: ignore[attr-defined]
            raise ValueError(
                "torch.export cannot trace `experts_implementation='eager'`: call "
                f"`model.set_experts_implementation({DEFAULT_EXPERTS!r})` first, the default."
            )

    # Transformers looks for the interfaces in the text of the file that defines a class.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation(requested_experts or DEFAULT_EXPERTS)  # type: ignore[misc]

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        raise ValueError(
            "Grok-1 caps its attention scores with 30 * tanh(s / 30), which `attn_implementation='sdpa'` cannot "
            "compute: use 'eager' (the default), 'flex_attention' or 'flash_attention_2'."
        )

    def set_input_embeddings(self, value: nn.Module) -> None:
        """As in Transformers. A plain `nn.Embedding` is given the embedding multiplier of the model."""
        present = self.get_input_embeddings()  # type: ignore[attr-defined]
        if type(value) is nn.Embedding and type(present) is not nn.Embedding:
            embedding = type(present)(*value.weight.shape, self.config.embedding_multiplier_scale)  # type: ignore[attr-defined]
            embedding.weight, value = value.weight, embedding
        super().set_input_embeddings(value)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """As in Transformers. Folders in the format of compressed-tensors are read without that library."""
        prepare = partial(own_config, requested=kwargs.get("quantization_config"))
        if isinstance(config, PreTrainedConfig):
            config = prepare(config)
        token = PREPARE_CONFIG.set(prepare)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)  # type: ignore[misc]
        finally:
            PREPARE_CONFIG.reset(token)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        # Here the device map is final, the files of the checkpoint and the names in them are known, and no weight is
        # read yet. Adapters come here too, with the keys that they expect.
        if expected_keys is not None:
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        check_tied_devices(model, load_config)
        if model.experts_on is not None:
            attach_expert_store(model, checkpoint_files, load_config)
        result = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)
        check_loaded(model, result[0], load_config)
        quantization = getattr(load_config.hf_quantizer, "quantization_config", None)
        if quantization is not None and not getattr(quantization, "dequantize", False):
            method = quantization.quant_method
            check_quantized_experts(model, str(getattr(method, "value", method)))
        if load_config.hf_quantizer is None:
            # Transformers keeps the conversions that this checkpoint needed. Saving separates the experts always.
            model._weight_conversions = [
                conversion
                for conversion in load_config.weight_mapping
                if conversion.was_used() or isinstance(conversion, WeightConverter)
            ]
        return result

    def save_pretrained(self, save_directory, is_main_process=True, state_dict: dict | None = None, *args, **kwargs):
        """
        As in Transformers. `lm_head.weight` is written although it is tied: some engines never tie.

        Raises:
            ValueError: the model was loaded with `experts_on`, or is quantised and cut into pipeline stages.
        """
        adapter = getattr(self, "_hf_peft_config_loaded", False)
        if self.experts_on is not None and not adapter:
            raise ValueError(
                f"`experts_on={self.experts_on!r}` left the experts in {self.name_or_path!r}, so this model is not "  # type: ignore[attr-defined]
                "whole and cannot be saved: copy that folder, or load it without `experts_on` and save."
            )
        state_dict = gather_pipeline(self, state_dict)
        if not adapter and not kwargs.get("distributed_checkpoint", False):
            state_dict = with_tied_head(self, state_dict)
        if self.experts_layout == LINEAR and not isinstance(getattr(self, "hf_quantizer", None), Grok1Quantizer):
            # In memory as on disk: nothing to revert, and Transformers cannot revert what other libraries quantised.
            kwargs["save_original_format"] = False
        if not is_main_process and hasattr(next(self.parameters()), "ds_id"):  # type: ignore[attr-defined]
            # This rank writes nothing, and holds the parts that ZeRO-3 left it, which no conversion can revert.
            kwargs["save_original_format"] = False
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[misc]
        if is_main_process:
            copy_mlx_file(self, save_directory)

    def dequantize(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """As in Transformers: the model with plain weights in `dtype`, by default the dtype that it was loaded in."""
        if dtype is None and isinstance(self.config.dtype, str):  # type: ignore[attr-defined]
            dtype = getattr(torch, self.config.dtype)  # type: ignore[attr-defined]  # saving leaves the dtype's name
        return super().dequantize(dtype)  # type: ignore[misc]


def untie(config: Any, layer: Any) -> None:
    """Gives an embedding, or a head, that is tied to the other a weight of its own."""
    if config.tie_word_embeddings and not hasattr(layer.weight, "ds_id"):  # ZeRO-3 keeps a part of it only
        layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
        config.tie_word_embeddings = False


def copy_mlx_file(model: Any, folder: str | os.PathLike) -> None:
    """mlx-lm's code, which config.json names and no import leads to, beside the code that Transformers saves."""
    folder = Path(folder)
    for place in (Path(__file__).parent, Path(model.name_or_path)):
        if (folder / "modeling_grok1.py").is_file() and (place / MLX_FILE).is_file():
            if place.resolve() != folder.resolve():
                shutil.copyfile(place / MLX_FILE, folder / MLX_FILE)
            return


def check_tied_devices(model: Any, load_config: Any) -> None:
    """Raises ValueError where the device map separates the embedding and the head that is tied to it."""
    tied = model._tied_weights_keys or {}
    if not tied or not model.config.tie_word_embeddings:
        return
    head, embedding = next(iter(tied.items()))
    devices = expand_device_map(load_config.device_map, [head, embedding])
    if devices[head] != devices[embedding]:
        raise ValueError(
            f"`device_map` puts `{embedding}` on {devices[embedding]!r} and `{head}` on {devices[head]!r}, but they "
            "are one tensor (`tie_word_embeddings`): give both the same device."
        )


def attach_expert_store(model: Any, checkpoint_files: list[str] | None, load_config: Any) -> None:
    """Opens the experts in the checkpoint's files for a model with `experts_on`."""
    model.expert_store = ExpertStore.open(
        model.config, checkpoint_files, load_config, model.experts_on, model.expert_cache
    )
    for layer_idx, layer in enumerate(model.base_model.layers):
        layer.block_sparse_moe.experts.store = model.expert_store
        layer.block_sparse_moe.experts.layer_idx = layer_idx


def gather_pipeline(model: Any, state_dict: dict | None) -> dict | None:
    """The weights of all pipeline stages, on the first one. Transformers would write the first stage alone."""
    stage = getattr(model, "_pp_stage", None)
    if stage is None:
        return state_dict
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("A quantised model is not saved from a pipeline: load it without `pp_size` and save.")
    here = {name: tensor.cpu() for name, tensor in (state_dict or model.state_dict()).items()}
    stages = [here] * stage.pp_size if stage.pp_is_first_stage else None
    torch.distributed.gather_object(here, stages, group=stage.pp_group, group_dst=0)
    return {name: tensor for part in stages or [here] for name, tensor in part.items()}


def with_tied_head(model: Any, state_dict: dict | None) -> dict | None:
    """The weights with a copy of the embedding for the head that is tied to it."""
    tied = model._tied_weights_keys or {}
    if not tied or not model.config.tie_word_embeddings:
        return state_dict
    head, embedding = next(iter(tied.items()))
    state_dict = dict(model.state_dict() if state_dict is None else state_dict)
    weight = state_dict.get(embedding)
    if weight is not None:
        if weight.device.type == "meta":
            weight = load_offloaded_parameter(model, embedding)
        state_dict[head] = weight.clone()
    return state_dict
