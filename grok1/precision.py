"""The precisions in which Grok-1 is stored and computed: one row each, used by every command.

To add one, add a row to `PRECISIONS`. Importing this module loads neither torch nor Transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from grok1.files import read_json


# Bytes of one attention or expert matrix, from its parameter name, output features and input features.
MatrixBytes = Callable[[str, int, int], int]

# Scale blocks along the input of the released int8 matrices; 1 where not named.
INT8_SCALE_BLOCKS = {"o_proj": 8, "w2": 8}


def int8_bytes(name: str, rows: int, columns: int) -> int:
    """xAI's int8: one byte per weight, one bfloat16 scale per row and scale block."""
    return rows * columns + 2 * rows * INT8_SCALE_BLOCKS.get(name.split(".")[-2], 1)


def int4_bytes(name: str, rows: int, columns: int) -> int:
    """Half a byte per weight, one bfloat16 scale per row and group of 128 inputs (W4A16, `pack-quantized`)."""
    return math.ceil(rows * columns / 2) + 2 * rows * math.ceil(columns / 128)


def bnb_int8_bytes(name: str, rows: int, columns: int) -> int:
    """LLM.int8(): one byte per weight, one float32 scale per row (bitsandbytes `Linear8bitLt`)."""
    return rows * columns + 4 * rows


def bnb_4bit_bytes(name: str, rows: int, columns: int) -> int:
    """Half a byte per weight, a float32 maximum per 64 weights, a table of 16 float32 (bitsandbytes `QuantState`)."""
    blocks = math.ceil(rows * columns / 64)
    return math.ceil(rows * columns / 2) + 4 * blocks + 16 * 4


def bnb_4bit_double_bytes(name: str, rows: int, columns: int) -> int:
    """As `bnb_4bit_bytes`, with the maxima in 8 bits: one float32 scale per 256 of them, a table and a mean."""
    blocks = math.ceil(rows * columns / 64)
    return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + 256 * 4 + 4 + 16 * 4


@dataclass(frozen=True)
class ConfigCall:
    """A quantization config of a library, as an object and as source code.

    Args:
        module: where the class is imported from.
        name: of the class.
        options: its keyword arguments.
    """

    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """The config object. Imports the library."""
        return getattr(import_module(self.module), self.name)(**self.options)

    @property
    def code(self) -> str:
        """The call as Python source; `from MODULE import NAME` goes before it."""
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.options.items())})"


@dataclass(frozen=True)
class Precision:
    """How the matrices of attention and experts are stored, and in which dtype the model computes.

    Args:
        name: the word for it in every command.
        title: the words for it in a table.
        dtype: compute dtype; also that of the embedding, the head, the KV cache and the activations.
        matrix_bytes: stored bytes of one matrix; None: `dtype`'s element size.
        quantization: what to pass as `quantization_config` to quantise a bfloat16 or float32 folder while it loads.
        converted: the `grok1 convert --dtype` that writes the folder to load. Where this is `name` and `quantization`
            is given, that folder needs no quantization config.
        sharded: tensor and expert parallelism can split the matrices.
        offloaded: the experts can stay in host memory or on disk (`experts_on`).
        engines: vLLM reads the folder.
        dequantizes: a matrix is expanded to `dtype` before its product, which takes that much memory more.
    """

    name: str
    title: str
    dtype: str = "bfloat16"
    matrix_bytes: MatrixBytes | None = None
    quantization: ConfigCall | None = None
    converted: str = "bfloat16"
    sharded: bool = True
    offloaded: bool = True
    engines: bool = True
    dequantizes: bool = False

    @property
    def on_load(self) -> ConfigCall | None:
        """The quantization config to pass with the folder that `grok1 convert --dtype CONVERTED` writes."""
        return None if self.converted == self.name else self.quantization


def _bnb(name: str, title: str, matrix_bytes: MatrixBytes, **options: Any) -> Precision:
    """A precision of bitsandbytes: quantised while a bfloat16 folder loads, one `nn.Linear` per matrix."""
    four_bits = "load_in_4bit" in options
    if four_bits:
        options["bnb_4bit_compute_dtype"] = "bfloat16"
    config = ConfigCall("transformers", "BitsAndBytesConfig", options)
    return Precision(
        name,
        title,
        matrix_bytes=matrix_bytes,
        quantization=config,
        sharded=False,
        offloaded=False,
        engines=False,
        dequantizes=four_bits,
    )


_INT8 = ConfigCall("modeling_grok1", "Grok1Int8Config")
_INT4 = ConfigCall("modeling_grok1", "Grok1Int4Config")
_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
_FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
_DOUBLE = {"bnb_4bit_use_double_quant": True}

PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        Precision("float32", "float32", dtype="float32", converted="float32"),
        Precision("bfloat16", "bfloat16"),
        Precision("int8", "int8, xAI's values", matrix_bytes=int8_bytes, quantization=_INT8, converted="int8"),
        Precision("int4", "int4, groups of 128", matrix_bytes=int4_bytes, quantization=_INT4, converted="int4"),
        _bnb("int8-bnb", "int8, bitsandbytes", bnb_int8_bytes, load_in_8bit=True),
        _bnb("nf4", "nf4", bnb_4bit_bytes, **_NF4),
        _bnb("nf4-double", "nf4, double quantisation", bnb_4bit_double_bytes, **_NF4, **_DOUBLE),
        _bnb("fp4", "fp4", bnb_4bit_bytes, **_FP4),
    )
}

# Other spellings, refused with the name to use.
RENAMED = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "w8a16": "int8",
    "w4a16": "int4",
    "bnb-8bit": "int8-bnb",
    "bnb-4bit": "nf4",
}

AUTO = "auto"  # as the folder's files are stored


def find_precision(name: str) -> Precision:
    """The row of `name`. Raises ValueError for another name, which says the one to use where it was renamed."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name in RENAMED:
        raise ValueError(f"`precision`: {name!r} is called {RENAMED[name]!r} here.")
    raise ValueError(f"`precision`: expected one of {', '.join(PRECISIONS)}, found {name!r}.")


def loading_options(folder: str | Path, precision: str = AUTO) -> dict[str, Any]:
    """The `dtype` and `quantization_config` with which `from_pretrained` loads a folder in a precision.

    Args:
        folder: a converted folder; its config.json says whether it is quantised already.
        precision: a key of `PRECISIONS`, or "auto" for the folder's own. "float32" and "bfloat16" set the compute
            dtype of a quantised folder and leave its matrices as they are stored.

    Raises:
        ValueError: an unknown precision, or one that would quantise a folder again that is quantised otherwise.
    """
    if precision == AUTO:
        return {"dtype": AUTO}
    wanted = find_precision(precision)
    options: dict[str, Any] = {"dtype": wanted.dtype}
    if wanted.quantization is None:
        return options
    stored = stored_precision(folder)
    if stored is None or (stored, precision) == ("int8", "int4"):
        options["quantization_config"] = wanted.quantization.build()
    elif stored != precision:
        raise ValueError(
            f"`precision`: {folder} is stored as {stored}, which cannot be quantised again to {precision}: "
            "expected a bfloat16 or float32 folder."
        )
    return options


def stored_precision(folder: str | Path) -> str | None:
    """The quantised precision that a folder's config.json declares; None where it is not quantised, or not there.

    A key of `PRECISIONS` where it is one of them, else the `quant_method`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    config = read_json(path).get("quantization_config")
    if config is None:
        return None
    method = str(config.get("quant_method"))
    if method == "compressed-tensors":
        bits = {group["weights"]["num_bits"] for group in config["config_groups"].values()}
        return f"int{bits.pop()}" if len(bits) == 1 else method
    if method == "bitsandbytes":
        if config.get("load_in_8bit"):
            return "int8-bnb"
        return f"{config['bnb_4bit_quant_type']}{'-double' if config.get('bnb_4bit_use_double_quant') else ''}"
    return {"grok1_int8": "int8", "grok1_int4": "int4"}.get(method, method)
