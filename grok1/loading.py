"""Opens the model of a converted folder: the one way of every command that computes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grok1.files import INDEX_NAME, SINGLE_NAME, TORCH_NAME, read_model_folder
from grok1.precision import AUTO, loading_options


def check_weights(folder: str | Path) -> None:
    """Check that a folder's weight files are all there, complete, and the folder's own. Only their headers are read.

    Folders without safetensors files pass; Transformers reads other formats or says what is missing.

    Raises:
        ConversionError: with every problem, as `grok1.files.read_model_folder`.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).exists():
        read_model_folder(folder, dtypes=tuple(TORCH_NAME.values()))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder, without the folder's own code."""
    from transformers import AutoTokenizer

    import modeling_grok1  # noqa: F401  (without it Transformers asks whether to run the folder's code)

    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: str | Path, precision: str = AUTO, **options: Any) -> Any:
    """The model of a folder in a precision, in eval mode.

    Args:
        folder: a converted folder.
        precision: as in `grok1.precision.loading_options`.
        options: further arguments of `from_pretrained`, such as device_map or experts_on.

    Raises:
        ConversionError: a weight file is missing, cut off, or outside of the folder.
        ValueError: as `loading_options`, or from `from_pretrained`.
    """
    check_weights(folder)
    options = {**loading_options(folder, precision), **options}

    from transformers import AutoModelForCausalLM

    import modeling_grok1  # noqa: F401  (registers the classes)

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
