# Copyright 2026 The modeling-grok1 authors. Licensed under the Apache License, Version 2.0.
"""
Weights of 8 and 4 bits as quantization methods of Transformers: their configurations, and the quantizer that puts the
modules of quantized_grok1.py in place of Grok-1's projections and experts, loads, quantises, saves and dequantises
them.

Folders are in the format of packing_grok1.py, whose config.json names the compressed-tensors library. Transformers has
a quantizer of that name, which needs the library and does not reach fused experts. So a model of this package renames
the method in its own copy of the config, when it is loaded; what is saved has the library's name again.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .int4_grok1 import as_in_files
from .packing_grok1 import (
    GROUP_SIZES,
    bits_and_group_size,
    pack,
    quantise_int4,
    quantise_int8,
    quantization_dict,
    repeat_scales,
    unpack,
)
from .quantized_grok1 import QuantizedExperts, QuantizedLinear, dequantise, form_for_device, outputs_and_inputs
from .versions_grok1 import CASTS_BEFORE_QUANTIZING, allow_many_to_many


INT8, INT4 = "grok1_int8", "grok1_int4"
# Names of the matrices that are quantised, and of those with `scale_blocks` blocks per row; the others have one.
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")
BLOCKED = ("o_proj", "w2", "down_proj")


# --------------------------------------------------------------------------------------------------------------------
# Configurations
# --------------------------------------------------------------------------------------------------------------------
class PackedConfig(QuantizationConfigMixin):
    """What both precisions share. `source` is the bits and the group size of the files, None where they are floats."""

    bits: int
    group_size: int | None
    source: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of config.json: compressed-tensors' own."""
        return quantization_dict(self.bits, self.group_size or GROUP_SIZES[0])

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def check_positive(name: str, value: Any, multiple: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % multiple != 0:
        expected = "a positive integer" if multiple == 1 else f"a positive multiple of {multiple}"
        raise ValueError(f"`{name}`: expected {expected}, found {value!r}.")


@dataclass
class Grok1Int8Config(PackedConfig):
    """
    xAI's int8, lossless. Passed to `from_pretrained` as `quantization_config`, it quantises floating weights while
    they are loaded; a folder of int8 weights needs no argument.

    Args:
        scale_blocks (`int`): scale blocks per row of `o_proj` and of the experts' down projection (8 in the release)
            where floating weights are quantised; the other matrices have one scale per row.
        group_size (`int`, *optional*): inputs per scale in the folder that the model saves: the scale of a block is
            repeated for its groups. By default the largest power of two, up to 128, that divides all blocks; engines
            have kernels for 128, 64 and 32.

    Raises:
        ValueError: an argument is not a positive integer, or `quant_method` names another method.
    """

    scale_blocks: int = 8
    group_size: int | None = None
    source: tuple[int, int] | None = None
    quant_method: str = INT8  # type: ignore[assignment]
    bits = 8

    def __post_init__(self):
        check_positive("scale_blocks", self.scale_blocks)
        if self.group_size is not None:
            check_positive("group_size", self.group_size)
        if self.quant_method != INT8:
            raise ValueError(f"`quant_method`: expected {INT8!r}, found {self.quant_method!r}.")


@dataclass
class Grok1Int4Config(PackedConfig):
    """
    Symmetric int4 with a bfloat16 scale per group of inputs. Passed to `from_pretrained` as `quantization_config`, it
    quantises the weights of a floating or int8 folder while they are loaded; an int4 folder needs no argument.

    Args:
        group_size (`int`): inputs per scale. 32 loses less than 128 and takes 4.5 bits per weight instead of 4.125.
        scale_search (`bool`): choose each scale by the squared error of its group. False: round to nearest with the
            largest magnitude at the end of the range.

    Raises:
        ValueError: `group_size` is no positive multiple of 8, or `quant_method` names another method.
    """

    group_size: int = 128
    scale_search: bool = True
    source: tuple[int, int] | None = None
    quant_method: str = INT4  # type: ignore[assignment]
    bits = 4

    def __post_init__(self):
        check_positive("group_size", self.group_size, 8)
        if self.quant_method != INT4:
            raise ValueError(f"`quant_method`: expected {INT4!r}, found {self.quant_method!r}.")


def quantization_method(config: Any) -> str | None:
    """The method of `config.quantization_config`: this package's name for folders that this package reads."""
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        method = quantization.quant_method
    elif (found := bits_and_group_size(quantization)) is not None:
        method = INT8 if found[0] == 8 else INT4
    else:
        method = quantization.get("quant_method")
    return getattr(method, "value", method)


def read_with_this_package(quantization: Any, requested: Any = None) -> Any:
    """
    The `quantization_config` of a folder, renamed so that Transformers chooses the quantizer below.

    Args:
        quantization: from config.json; what is not in the format of packing_grok1.py is returned as it is.
        requested: the `quantization_config` of `from_pretrained`. A `Grok1Int4Config` for an int8 folder quantises it.

    Raises:
        ValueError: the folder is in the format that this package wrote before it wrote that of compressed-tensors.
    """
    if isinstance(quantization, dict) and quantization.get("quant_method") == INT8 and "source" not in quantization:
        raise ValueError(
            "This folder holds int8 weights in an older format that is no longer read: write it again from xAI's "
            "checkpoint with `grok1 convert SRC OUT --dtype int8`."
        )
    found = bits_and_group_size(quantization)
    if found is None:
        return quantization
    bits, group_size = found
    if isinstance(requested, Grok1Int4Config) and bits == 8:
        asked = {"group_size": requested.group_size, "scale_search": requested.scale_search}
        return {"quant_method": INT4, "source": found, **asked}
    return {"quant_method": INT8 if bits == 8 else INT4, "source": found, "group_size": group_size}


def own_config(config: Any, requested: Any = None) -> Any:
    """`config`, or a copy of it with its `quantization_config` renamed; see `read_with_this_package`."""
    quantization = getattr(config, "quantization_config", None)
    renamed = read_with_this_package(quantization, requested)
    if renamed is not quantization:
        config = copy.deepcopy(config)
        config.quantization_config = renamed
    return config


# --------------------------------------------------------------------------------------------------------------------
# Conversions between the tensors of the files and the parameters
# --------------------------------------------------------------------------------------------------------------------
class QuantiseFloats(ConversionOps):
    """A floating weight, or those of all experts, to a quantised weight and its scales."""

    def __init__(self, config: PackedConfig):
        self.config = config

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        output = {}
        for name, value in input_dict.items():
            floats = value[0] if isinstance(value, list) else value
            last = name.removesuffix(".weight").rpartition(".")[2]
            experts = [self.quantise(matrix, last) for matrix in (floats if floats.ndim == 3 else floats[None])]
            weight, scale = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
            output[name] = weight if floats.ndim == 3 else weight[0]
            output[f"{name}_scale"] = scale if floats.ndim == 3 else scale[0]
        return output

    def quantise(self, matrix: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(self.config, Grok1Int8Config):
            return quantise_int8(matrix, self.config.scale_blocks if name in BLOCKED else 1)
        assert isinstance(self.config, Grok1Int4Config)
        values, scale = quantise_int4(matrix, self.config.group_size, self.config.scale_search)
        return pack(values, 4), scale


@allow_many_to_many
class ReadPacked(ConversionOps):
    """`weight_packed` and `weight_scale` of a matrix, or of those of all experts, to a weight and its scales."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: "Grok1Quantizer"):
        self.hf_quantizer = hf_quantizer  # its presence tells Transformers not to cast the tensors

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        columns = [input_dict[pattern] for pattern in source_patterns]  # packed and scale, for gate, up
        pairs = [list(zip(*columns[i : i + 2], strict=True)) for i in range(0, len(columns), 2)]
        if "*" not in source_patterns[0]:
            return dict(zip(target_patterns, self.read(*pairs[0][0]), strict=True))
        # One matrix is read twice, for its form.
        E, first = len(pairs[0]), self.read(*pairs[0][0])  # noqa: N806
        F_ = len(first[0])  # noqa: N806
        weight, scale = (tensor.new_empty(E, len(pairs) * F_, tensor.shape[-1]) for tensor in first)
        for part, matrices in enumerate(pairs):
            rows = slice(part * F_, (part + 1) * F_)
            for e, pair in enumerate(matrices):
                packed, part_scale = pair
                scale[e, rows] = self.read(packed, part_scale, out=weight[e, rows])[1]
        return dict(zip(target_patterns, (weight, scale), strict=True))

    def read(
        self, packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and the scales of one matrix, the weight in `out` where it is given."""
        config = self.hf_quantizer.quantization_config
        bits = (config.source or (config.bits, 0))[0]
        if bits == config.bits == 8:
            return unpack(packed, 8, out), scale
        if bits != config.bits:
            assert isinstance(config, Grok1Int4Config)
            floats = dequantise(unpack(packed, bits), scale, torch.float32)
            values, scale = quantise_int4(floats, config.group_size, config.scale_search)
            packed = pack(values, 4)
        return packed if out is None else out.copy_(packed), scale

    @property
    def reverse_op(self) -> ConversionOps:
        return WritePacked(self.hf_quantizer)


@allow_many_to_many
class WritePacked(ConversionOps):
    """The reverse of `ReadPacked`; adds `weight_shape`."""

    supports_many_to_many = True

    def __init__(self, hf_quantizer: "Grok1Quantizer"):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        weight, scale = (
            value[0] if isinstance(value, list) else value for value in (input_dict[key] for key in source_patterns)
        )
        N, K = outputs_and_inputs(weight)  # noqa: N806
        if weight.dtype != torch.int8:
            weight, scale = as_in_files(weight, scale)
        group_size = self.hf_quantizer.quantization_config.group_size
        assert group_size is not None  # set when the model was built
        scale = repeat_scales(scale, K // group_size)
        names = [pattern.removesuffix("_packed") for pattern in target_patterns if pattern.endswith("_packed")]
        experts = zip(weight, scale, strict=True) if weight.ndim == 3 else [(weight, scale)]
        output: dict[str, torch.Tensor] = {}
        for e, (values, scales) in enumerate(experts):
            parts = zip(names, values.chunk(len(names)), scales.chunk(len(names)), strict=True)
            for pattern, part, part_scale in parts:
                name = pattern.replace("*", str(e))
                output[f"{name}_packed"] = pack(part, 8) if part.dtype == torch.int8 else part
                output[f"{name}_scale"] = part_scale.contiguous()
                output[f"{name}_shape"] = torch.tensor((N // len(names), K))
        return output

    @property
    def reverse_op(self) -> ConversionOps:
        return ReadPacked(self.hf_quantizer)


def packed_conversions(hf_quantizer: "Grok1Quantizer", fused: bool) -> list[WeightConverter]:
    """How the tensors of a folder become parameters, in both directions."""
    matrices = {f"{name}.weight": [f"{name}.weight"] for name in QUANTISED if not (fused and name.startswith("w"))}
    if fused:
        matrices[".experts.gate_up_proj"] = [".experts.*.w1.weight", ".experts.*.w3.weight"]
        matrices[".experts.down_proj"] = [".experts.*.w2.weight"]
    return [
        WeightConverter(
            source_patterns=[f"{name}_{part}" for name in names for part in ("packed", "scale")],
            target_patterns=[target, f"{target}_scale"],
            operations=[ReadPacked(hf_quantizer)],
        )
        for target, names in matrices.items()
    ]


# --------------------------------------------------------------------------------------------------------------------
# The quantizer
# --------------------------------------------------------------------------------------------------------------------
class Grok1Quantizer(HfQuantizer):
    """Quantised modules for the projections and experts; embedding, norms, router and heads keep their floats."""

    quantization_config: Grok1Int8Config | Grok1Int4Config
    requires_calibration = False
    # Transformers derives the parallel plans of the scales from those of the weights.
    serialized_names = {"weight": ["weight", "weight_scale"]}

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes per weight that is quantised while loading, where its empty parameter is floating until then."""
        return self.quantization_config.bits / 8 if CASTS_BEFORE_QUANTIZING else None

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
        return QuantiseFloats(self.quantization_config)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs) -> bool:
        module = model.get_submodule(param_name.rpartition(".")[0])
        is_quantised = isinstance(module, QuantizedLinear | QuantizedExperts)
        return not self.pre_quantized and is_quantised and not param_name.endswith("_scale")

    def update_weight_conversions(self, weight_conversions: list, model: PreTrainedModel) -> list:
        if not self.pre_quantized:
            return weight_conversions
        return self.conversions_of_folders(weight_conversions, model)

    def conversions_of_folders(self, weight_conversions: list, model: PreTrainedModel) -> list:
        """The renamings of the model, and conversions of packed weights instead of floating ones."""
        renamings = [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]
        fused = any(isinstance(module, QuantizedExperts) for module in model.modules())
        return renamings + packed_conversions(self, fused)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        config = self.quantization_config
        blocks = blocks_by_inputs(model.config, config)
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.weight_shape$"}
        for name, module in list(model.named_modules()):
            last = name.rpartition(".")[2]
            with torch.device("meta"):
                if type(module) is nn.Linear and last in QUANTISED:
                    shape = (module.in_features, module.out_features)
                    quantised: nn.Module = QuantizedLinear(*shape, bits=config.bits, blocks=blocks[last])
                elif last == "experts" and hasattr(module, "gate_up_proj"):
                    quantised = QuantizedExperts(module, config.bits, blocks["w1"], blocks["w2"])
                else:
                    continue
                if CASTS_BEFORE_QUANTIZING and not self.pre_quantized:
                    for key, floats in module.named_parameters():
                        setattr(quantised, key, nn.Parameter(floats, requires_grad=False))
            model.set_submodule(name, quantised)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        for module in model.modules():
            if isinstance(module, QuantizedLinear | QuantizedExperts):
                module.requires_grad_(False)
                if not hasattr(module, "_hf_hook"):  # whose weights come from elsewhere at each forward
                    prepare_for_device(module)
        if not self.pre_quantized:
            # What is saved is a folder of packed weights, which the mapping of the floats does not write.
            conversions = get_model_conversion_mapping(model, add_legacy=False)
            model._weight_conversions = self.conversions_of_folders(conversions, model)  # type: ignore[assignment]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """
        Every matrix in the model's dtype. The result is a plain model, which saves an ordinary folder.

        Raises:
            ValueError: another dtype is asked for, or weights are offloaded or sharded.
        """
        check_dequantisable(model, dtype)
        for name, module in list(model.named_modules()):
            if not isinstance(module, QuantizedLinear | QuantizedExperts):
                continue
            with torch.device("meta"):
                if isinstance(module, QuantizedLinear):
                    plain: nn.Module = nn.Linear(module.in_features, module.out_features, bias=False)
                else:
                    plain = module.plain_class(model.config)
            for key, _ in plain.named_parameters():
                floats = dequantise(getattr(module, key), getattr(module, f"{key}_scale"), model.dtype)
                setattr(plain, key, nn.Parameter(floats))
            model.set_submodule(name, plain.train(module.training))
        model._weight_conversions = None  # type: ignore[assignment]  # those of packed weights are of no use now
        return model


def prepare_for_device(module: nn.Module) -> None:
    """Bring the plain weights of a quantised module into the form that products on their device read."""
    for key in [name for name, _ in module.named_parameters() if not name.endswith("_scale")]:
        weight, scale = getattr(module, key).data, getattr(module, f"{key}_scale").data
        if type(weight) is torch.Tensor:
            for name, tensor in zip((key, f"{key}_scale"), form_for_device(weight, scale), strict=True):
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def blocks_by_inputs(config: Any, quantization: Grok1Int8Config | Grok1Int4Config) -> dict[str, int]:
    """
    Scale blocks per row of each matrix as it is loaded. Sets the default of `group_size`.

    Raises:
        ValueError: the blocks or groups do not divide the inputs of a matrix, or tensor parallelism cuts one; all
            problems in one message.
    """
    inputs = dict.fromkeys(QUANTISED, ("hidden_size", config.hidden_size))
    inputs["o_proj"] = ("num_attention_heads * head_dim", config.num_attention_heads * config.head_dim)
    inputs["w2"] = ("intermediate_size", config.intermediate_size)
    if isinstance(quantization, Grok1Int8Config) and quantization.source is None:
        option, blocks = "scale_blocks", quantization.scale_blocks
        sizes = {label: size for name, (label, size) in inputs.items() if name in BLOCKED}
        problems = [
            f"`scale_blocks`: expected a divisor of {label} ({size}), found {blocks}"
            for label, size in sizes.items()
            if size % blocks != 0
        ]
        found = {name: blocks if name in BLOCKED else 1 for name in QUANTISED}
    else:
        option, group_size = "group_size", quantization.group_size
        problems = [
            f"`group_size`: expected a divisor of {label} ({size}), found {group_size}{what_divides(size)}"
            for label, size in dict(inputs.values()).items()
            if size % group_size != 0
        ]
        found = {name: size // group_size for name, (_, size) in inputs.items()}
    tp_size = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
    ep_size = getattr(getattr(config, "distributed_config", None), "ep_size", None) or 1
    cut = {name: found[name] for name in BLOCKED if name in found and not (name == "w2" and ep_size > 1)}
    for name, blocks in cut.items():
        if not problems and blocks % tp_size != 0:
            problems.append(
                f"`tp_size`: expected a divisor of the {blocks} scale blocks of {name} (`{option}`), found {tp_size}: "
                "each rank must hold whole blocks"
            )
    if problems:
        raise ValueError("The quantised weights cannot be loaded: " + "; ".join(problems) + ".")
    if quantization.group_size is None:
        block_sizes = (size // found[name] for name, (_, size) in inputs.items())
        quantization.group_size = math.gcd(GROUP_SIZES[0], *block_sizes)
    return found


def what_divides(size: int) -> str:
    """The group sizes that would do, for an error message."""
    sizes = [str(group_size) for group_size in GROUP_SIZES if size % group_size == 0]
    return f"; {' or '.join(sizes)} would do" if sizes else ""


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


for method, config_class in {INT8: Grok1Int8Config, INT4: Grok1Int4Config}.items():
    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(method)(Grok1Quantizer)
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(config_class)
