# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
xAI's int8 as a quantization method of Transformers: its configuration, and the quantizer that puts the modules of
int8_grok1.py in place of Grok-1's projections and experts, loads, quantises, saves and dequantises them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int8_grok1 import Int8Experts, Int8Linear, dequantise, quantise


QUANT_METHOD = "grok1_int8"
# Names of the matrices that are quantised, and of those with `scale_blocks` blocks per row; the others have one.
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
BLOCKED = ("o_proj", "w2", "down_proj")


@dataclass
class Grok1Int8Config(QuantizationConfigMixin):
    """
    xAI's int8. A folder of int8 weights names it in its config.json. Passed to `from_pretrained` as
    `quantization_config`, it quantises floating weights while they are loaded.

    Args:
        scale_blocks (`int`): scale blocks per row of `o_proj` and of the experts' down projection (8 in the release);
            the other matrices have one scale per row.

    Raises:
        ValueError: `scale_blocks` is not a positive integer, or `quant_method` names another method.
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
    """Int8 modules for the projections and experts; embedding, norms, router and heads keep their floats."""

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
        is_int8 = isinstance(module, Int8Linear | Int8Experts)
        return not self.pre_quantized and is_int8 and not param_name.endswith("_scale")

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        blocks = self.quantization_config.scale_blocks
        check_scale_blocks(model.config, blocks)
        for name, module in list(model.named_modules()):
            last = name.rpartition(".")[2]
            with torch.device("meta"):
                if type(module) is nn.Linear and last in QUANTISED:
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
        Every matrix in the model's dtype. The result is a plain model, which saves an ordinary folder.

        Raises:
            ValueError: another dtype is asked for, or weights are offloaded or sharded.
        """
        check_dequantisable(model, dtype)
        for name, module in list(model.named_modules()):
            if not isinstance(module, Int8Linear | Int8Experts):
                continue
            with torch.device("meta"):
                if isinstance(module, Int8Linear):
                    plain: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
                else:
                    plain = module.plain_class(model.config)
            for key, _ in plain.named_parameters():
                floats = dequantise(getattr(module, key), getattr(module, f"{key}_scale"), model.dtype)
                setattr(plain, key, nn.Parameter(floats))
            model.set_submodule(name, plain.train(module.training))
        return model


def check_scale_blocks(config: Any, blocks: int) -> None:
    """Raises ValueError, with every reason, where `blocks` does not divide a matrix's inputs or is cut by a rank."""
    problems = [
        f"`scale_blocks`: expected a divisor of {label} ({size}), found {blocks}"
        for label, size in {
            "num_attention_heads * head_dim": config.num_attention_heads * config.head_dim,
            "intermediate_size": config.intermediate_size,
        }.items()
        if size % blocks != 0
    ]
    tp_size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    if blocks % tp_size != 0:
        problems.append(
            f"`tp_size`: expected a divisor of the {blocks} scale blocks of o_proj and the experts' down projection, "
            f"found {tp_size}: each rank must hold whole blocks"
        )
    if problems:
        raise ValueError("The int8 weights cannot be loaded: " + "; ".join(problems) + ".")


def check_dequantisable(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Raises ValueError where `dtype` is not the model's, or weights are offloaded or sharded."""
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
            f"`dequantize`: {len(elsewhere)} weights are offloaded or sharded ({elsewhere[0]} is the first): load the "
            "whole model into memory."
        )


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(QUANT_METHOD)(Grok1Int8Quantizer)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(Grok1Int8Config)
