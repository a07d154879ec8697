"""Opens the model and the tokenizer of a converted folder: the one way of every command that computes with them.

Everything is checked from the small files and the headers before a weight is read: a wrong folder is refused in a
second, with the names of what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grok1.conversion.facts import layout_of
from grok1.conversion.inputs import refuse_grok2
from grok1.conversion.names import HEAD_NAME
from grok1.errors import ConversionError
from grok1.files import INDEX_NAME, SINGLE_NAME, TORCH_NAME, StoredTensor, read_json, read_model_folder
from grok1.precision import AUTO, loading_options
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import bits_and_group_size


CONFIG_NAME, TOKENIZER_NAME, ADAPTER_NAME = "config.json", "tokenizer.json", "adapter_config.json"
# Read by Transformers where they are there.
OPTIONAL_JSON = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAKE_ONE = "`grok1 convert CKPT OUT` makes a folder from xAI's checkpoint."
REPAIR = "Fetch or copy these files again; `grok1 verify FOLDER` compares them with their recorded sums."


def check_folder(folder: str | Path, tokenizer: bool = True) -> GrokConfig:
    """Check that a folder is a whole Grok-1: its JSON files, its sizes, and the headers of its weight files.

    Args:
        folder: a converted folder.
        tokenizer: whether tokenizer.json is needed too.

    Raises:
        ConversionError: with every problem: a file that is missing, cut off, of another kind or outside of the folder;
            another kind of model; a tensor that is missing, left over, or of another shape.
    """
    folder = Path(folder)
    values = _json_files(folder, tokenizer)
    config = _config(folder, values)
    if any(os.path.lexists(folder / name) for name in (INDEX_NAME, SINGLE_NAME)):
        tensors = read_model_folder(folder, dtypes=tuple(TORCH_NAME.values()))
        _check_names(folder, config, values.get("quantization_config"), tensors)
    else:
        other = any(folder.glob("*.bin"))
        raise ConversionError(
            f"{folder}: no weights",
            [f"expected {INDEX_NAME} or {SINGLE_NAME} in {folder}, found {'.bin files' if other else 'neither'}"],
            "`grok1 adopt FOLDER OUT` rewrites .bin files." if other else MAKE_ONE,
        )
    return config


def _json_files(folder: Path, tokenizer: bool) -> dict[str, Any]:
    """The values of config.json, after all JSON files have been read once."""
    needed = [CONFIG_NAME, TOKENIZER_NAME] if tokenizer else [CONFIG_NAME]
    problems: list[str] = []
    lacking: list[str] = []
    values: dict[str, Any] = {}
    if not os.path.lexists(folder / CONFIG_NAME) or _has_tensor_files(folder):
        _refuse_other_folders(folder)
    for name in (*needed, *OPTIONAL_JSON):
        if not os.path.lexists(folder / name):
            if name in needed:
                problems.append(f"{folder / name}: not there")
                lacking.append(name)
            continue
        try:
            found = read_json(folder / name)
            values = found if name == CONFIG_NAME else values
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if os.path.lexists(folder / ADAPTER_NAME):
        _refuse_other_folders(folder)
    if problems:
        next_step = REPAIR
        if lacking == [TOKENIZER_NAME]:
            next_step = f"`grok1 tokenizer TOKENIZER.MODEL {folder}` writes the tokenizer's files."
        elif lacking:
            next_step = MAKE_ONE
        raise ConversionError(f"{folder}: not a converted folder", problems, next_step)
    return values


def _has_tensor_files(folder: Path) -> bool:
    return any((folder / place / "tensor00000_000").exists() for place in ("", "ckpt-0", "ckpt"))


def _refuse_other_folders(folder: Path) -> None:
    """Raises ConversionError for xAI's own folder, and for one that holds an adapter, which is not a whole model."""
    if _has_tensor_files(folder):
        raise ConversionError(
            f"{folder}: this is xAI's own checkpoint, which Transformers does not read",
            next_step=f"Convert it: `grok1 convert {folder} OUT`, and use OUT.",
        )
    if os.path.lexists(folder / ADAPTER_NAME):
        raise ConversionError(
            f"{folder}: {ADAPTER_NAME} says that this is an adapter, and these commands open whole models",
            next_step="Load it with `PeftModel.from_pretrained`, `merge_and_unload()` it, and save the model.",
        )


def _config(folder: Path, values: dict[str, Any]) -> GrokConfig:
    path = folder / CONFIG_NAME
    refuse_grok2(path, values)
    problems = []
    if (found := values.get("model_type")) != GrokConfig.model_type:
        advice = "" if found is not None else "; `grok1 adopt FOLDER OUT` rewrites other repositories"
        problems.append(f"model_type: expected {GrokConfig.model_type!r}, found {found!r}{advice}")
    for name in ("dtype", "torch_dtype"):
        if values.get(name) is not None and values[name] not in tuple(TORCH_NAME.values()):
            problems.append(f"{name}: expected one of float32, bfloat16, float16, found {str(values[name])[:80]!r}")
    quantization = values.get("quantization_config")
    if quantization is not None and not (
        isinstance(quantization, dict) and isinstance(quantization.get("quant_method"), str)
    ):
        problems.append("quantization_config: expected an object with quant_method, found something else")
    if not problems:
        try:
            return GrokConfig.from_dict(values)
        except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
            problems.append(str(error))
    raise ConversionError(f"{path}: not the config of a Grok-1", problems)


def _check_names(folder: Path, config: GrokConfig, quantization: Any, tensors: dict[str, StoredTensor]) -> None:
    """Raises ConversionError for tensors that are missing, left over, or of another shape."""
    try:
        packing = bits_and_group_size(quantization)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{folder / CONFIG_NAME}: not the config of a Grok-1", [f"quantization_config: {error}"]
        ) from None
    if quantization is None or packing is not None:  # other methods have names of their own, which the loader checks
        layout_of(folder, config, tensors, packing)
    head, rows = tensors.get(HEAD_NAME), (config.vocab_size, config.hidden_size)
    if packing is None and quantization is None:
        found = "no such tensor" if head is None else str(head.shape)
        if (head is None and not config.tie_word_embeddings) or (head is not None and head.shape != rows):
            raise ConversionError(
                f"{folder}: its tensors are not those of a Grok-1", [f"{HEAD_NAME}: expected {rows}, found {found}"]
            )


def check_device_map(device_map: Any) -> None:
    """Raises ConversionError for a device that is not there."""
    import torch

    if not isinstance(device_map, str) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConversionError(
            f"device_map: {device_map!r} is not there: {str(error).splitlines()[0]}",
            next_step="Give auto, cpu, or a device that `torch` sees; `grok1 plan` shows what a model needs.",
        ) from None


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, without the folder's own code.

    Raises:
        ConversionError: a file of the tokenizer is damaged or another kind of file.
    """
    from transformers import AutoTokenizer

    import modeling_grok1  # noqa: F401  (without it Transformers asks whether to run the folder's code)

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ConversionError(
            f"{Path(folder) / TOKENIZER_NAME}: cannot be read as a tokenizer",
            [f"{type(error).__name__}: {str(error)[:300]}"],
            f"Write it again: `grok1 tokenizer TOKENIZER.MODEL {folder}`.",
        ) from error


def load_model(folder: str | Path, precision: str = AUTO, **options: Any) -> Any:
    """The model of a folder in a precision, in eval mode. Every weight that is in memory is read once, to find numbers
    that are not finite.

    Args:
        folder: a converted folder.
        precision: as in `grok1.precision.loading_options`.
        options: further arguments of `from_pretrained`, such as device_map or experts_on.

    Raises:
        ConversionError: as `check_folder` and `check_device_map`; or weights that are not finite, by name.
        ValueError: as `loading_options`, or from `from_pretrained`.
    """
    check_folder(folder, tokenizer=False)
    check_device_map(options.get("device_map"))
    options = {**loading_options(folder, precision), **options}

    from transformers import AutoModelForCausalLM, GenerationConfig

    import modeling_grok1  # noqa: F401  (registers the classes)

    generation = Path(folder) / "generation_config.json"
    if generation.is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise ConversionError(f"{generation}: not a generation config", [str(error)[:300]]) from error
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    if wrong := list(nonfinite_weights(model)):
        raise ConversionError(
            f"{folder}: weights are not finite",
            [f"{name}: expected finite numbers, found others" for name in wrong],
            REPAIR,
        )
    return model


def nonfinite_weights(model: Any) -> Iterator[str]:
    """The names of the weights in memory that hold NaN or infinity. No copy of a weight is made."""
    import torch

    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and not weight.is_meta:
            total = weight.detach().sum(dtype=torch.float32)
            # Finite numbers may add up to infinity.
            parts = weight.detach().reshape(-1).split(2**24)
            if not total.isfinite() and not all(part.isfinite().all() for part in parts):
                yield name
