"""The contents of a GGUF file, or of all files of a split one, from their headers alone."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grok1.conversion.gguf_header import config_of_keys
from grok1.conversion.names import KINDS, hub_tensors
from grok1.gguf_files import GgufModel, read_gguf, without_arrays


@dataclass
class GgufKind:
    """The tensors of one kind: `present` of `expected`, their bytes, and their types with shapes."""

    kind: str
    name: str
    expected: int
    present: int = 0
    nbytes: int = 0
    shapes: list[str] = field(default_factory=list)


@dataclass
class GgufInspection:
    """The result of `inspect_gguf`.

    Args:
        files: of the model, in their order.
        keys: the metadata, without the arrays of the vocabulary.
        pieces: of the vocabulary; 0 without one.
        kinds: a summary for each of the 14 kinds.
        nbytes: of all files.
        problems: tensors that are missing, unknown or of another shape, one line each.
    """

    files: list[Path]
    keys: dict[str, Any]
    pieces: int
    kinds: list[GgufKind]
    nbytes: int
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "files": [str(file) for file in self.files]}


def inspect_gguf(path: str | os.PathLike[str]) -> GgufInspection:
    """Reads the headers of a GGUF file and of its other splits.

    Raises:
        ConversionError: a file is missing or not a GGUF file, or the model is not a Grok-1.
    """
    model = read_gguf(Path(path))
    expected = hub_tensors(config_of_keys(model), "gguf")
    kinds = {kind.name: GgufKind(kind.name, kind.gguf, 0) for kind in KINDS.values()}
    problems = []
    for name, tensor in expected.items():
        summary = kinds[tensor.parts[0].entry.kind.name]
        summary.expected += 1
        found = model.tensors.get(name)
        if found is None:
            problems.append(f"{name}: expected {tensor.shape}, found no such tensor")
            continue
        summary.present += 1
        summary.nbytes += found.nbytes
        if found.shape != tensor.shape:
            problems.append(f"{name}: expected {tensor.shape}, found {found.shape}")
        if (shape := f"{found.dtype} {found.shape}") not in summary.shapes:
            summary.shapes.append(shape)
    problems += [f"{name}: expected only Grok-1's tensors, found this one too" for name in _surplus(model, expected)]
    pieces = len(model.keys.get("tokenizer.ggml.tokens", ()))
    nbytes = sum(file.stat().st_size for file in model.files)
    return GgufInspection(
        list(model.files), without_arrays(model.keys), pieces, list(kinds.values()), nbytes, problems
    )


def _surplus(model: GgufModel, expected: dict[str, Any]) -> list[str]:
    """Tensors of no kind. An untied head is one that llama.cpp's own converter writes."""
    return sorted(model.tensors.keys() - expected.keys() - {"output.weight"})
