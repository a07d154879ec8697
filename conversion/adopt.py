"""Weights of Grok-1 that other repositories hold, rewritten into the hub layout.

Reads the names of hpcai-tech/grok-1 and keyfan/grok-1-hf (and our own) from safetensors or .bin shards, and writes
what `grok1 convert` writes: the same names, order, companions and guarantees. A .bin shard is read with
`torch.load(weights_only=True, mmap=True)`, which runs no code. Blocks of rows are in memory, never a whole tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from grok1.conversion.convert import (
    TOKENIZER_NAME,
    Plan,
    Progress,
    free_bytes,
    write_at,
    write_companions,
    written_config,
)
from grok1.conversion.journal import PARTIAL_SUFFIX, claimed, output_problems, sync_folder
from grok1.conversion.names import HEAD_NAME, hub_tensors
from grok1.conversion.shards import Shard, parse_size, plan_shards
from grok1.errors import ConversionError
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.loading_grok1 import ALIASES


BLOCK_BYTES = 64 * 2**20
TORCH_DTYPE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: where it is, and how to read rows [start, stop) of it."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], torch.Tensor]


def hub_name(name: str) -> str:
    """The hub layout's name of a tensor, by the renamings with which the model reads other repositories."""
    for pattern, replacement in ALIASES:
        name = re.sub(pattern, replacement, name)
    return name


def adopt(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Plan:
    """Rewrites `folder` as a hub folder `out`. Run again after an interruption, it goes on.

    Matrices keep the dtype that most of them have (bfloat16 or float32); norms and routers become float32, which is
    exact from bfloat16. A tied head that the folder leaves out is written as a copy of the embedding.

    Raises:
        ConversionError: the folder is not a whole Grok-1 (every missing, unknown or mis-shaped tensor is listed), or
            `out` is in use or full.
    """
    folder, out = Path(folder), Path(out)
    config = _read_config(folder)
    stored, problems = _stored_tensors(folder)
    dtype = _main_dtype(stored)
    if dtype is None:
        problems.append(f"{folder}: expected matrices in bfloat16 or float32, found neither")
    shards = plan_shards(hub_tensors(config, "hub", dtype or "bfloat16").values(), parse_size(max_shard_size))
    problems += _mismatches(shards, stored)
    written = written_config(config, dtype or "bfloat16", 1)
    tokenizer = folder / TOKENIZER_NAME
    record = {
        "settings": {
            "max_shard_size": parse_size(max_shard_size),
            "config": json.loads(written.to_json_string(use_diff=False)),
            "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else None,
        },
        "source": {
            file: [(folder / file).stat().st_size, (folder / file).stat().st_mtime_ns]
            for file in sorted({tensor.file for tensor in stored.values()})
        },
    }
    problems += output_problems(out, record)
    plan = Plan(
        *(out, dtype or "bfloat16", "hub", parse_size(max_shard_size), written),
        *(tokenizer if tokenizer.is_file() else None, shards, frozenset(), record),
    )
    if not problems and free_bytes(out, shards) < plan.needed_bytes:
        problems.append(f"{out}: expected {plan.needed_bytes:,} free bytes, found {free_bytes(out, shards):,}")
    if problems:
        raise ConversionError(f"{folder}: cannot be adopted to {out}", problems, "Nothing was written.")
    with claimed(out, record):
        done = 0
        for shard in shards:
            path = out / shard.name
            if not path.is_file():
                for nbytes in _write_shard(path, shard, stored):
                    if progress is not None:
                        progress(done + nbytes, plan.nbytes)
            done += shard.nbytes
        write_companions(plan)
    return plan


def _read_config(folder: Path) -> GrokConfig:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for key in ("architectures", "auto_map", "quantization_config"):
            values.pop(key, None)
        return GrokConfig.from_dict(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path}: not the config of a Grok-1", [str(error)]) from None


def _stored_tensors(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Every tensor of the folder by its name in the hub layout, and what cannot be read, one line each."""
    stored: dict[str, Stored] = {}
    problems = []
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        problems.append(f"{folder}: expected *.safetensors or *.bin files, found none")
    for file in files:
        try:
            tensors = list(_safetensors(file) if file.suffix == ".safetensors" else _bin(file))
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            problems.append(f"{file.name}: expected a file of tensors, found {error}")
            continue
        for tensor in tensors:
            name = hub_name(tensor.name)
            if name in stored:
                problems.append(f"{file.name}: {tensor.name} is {name}, which {stored[name].file} has already")
            stored[name] = tensor
    return stored, problems


def _safetensors(file: Path) -> Iterator[Stored]:
    reader = safe_open(file, framework="pt")
    for name in reader.keys():  # noqa: SIM118  (a safe_open is no mapping)
        piece = reader.get_slice(name)
        dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}.get(
            piece.get_dtype(), torch.uint8
        )
        yield Stored(name, file.name, tuple(piece.get_shape()), dtype, partial(_rows, piece))


def _bin(file: Path) -> Iterator[Stored]:
    for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
        yield Stored(name, file.name, tuple(tensor.shape), tensor.dtype, partial(_rows, tensor))


def _rows(tensor: Any, start: int, stop: int) -> torch.Tensor:
    return tensor[start:stop]


def _main_dtype(stored: dict[str, Stored]) -> str | None:
    """The precision of the matrices, by their elements."""
    sizes = dict.fromkeys(TORCH_DTYPE, 0)
    for tensor in stored.values():
        for name, dtype in TORCH_DTYPE.items():
            if tensor.dtype == dtype and len(tensor.shape) == 2:
                sizes[name] += tensor.shape[0] * tensor.shape[1]
    return max(sizes, key=lambda name: sizes[name]) if any(sizes.values()) else None


def _mismatches(shards: list[Shard], stored: dict[str, Stored]) -> list[str]:
    expected = {tensor.name: tensor.shape for shard in shards for tensor in shard.tensors}
    problems = [
        f"{name}: expected {shape}, found {'no such tensor' if name not in stored else stored[name].shape}"
        for name, shape in expected.items()
        if name != HEAD_NAME and (name not in stored or stored[name].shape != shape)
    ]
    problems += [
        f"{stored[name].name}: expected no such tensor, found {stored[name].shape}"
        for name in stored.keys() - expected.keys()
    ]
    problems += [
        f"{tensor.name}: expected bfloat16 or float32, found {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in stored.items()
        if name in expected and tensor.dtype not in TORCH_DTYPE.values()
    ]
    return problems


def _write_shard(path: Path, shard: Shard, stored: dict[str, Stored]) -> Iterator[int]:
    """Writes a shard and yields the bytes written so far."""
    unfinished = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(descriptor, memoryview(shard.header), 0)
        written = len(shard.header)
        for tensor in shard.tensors:
            source = stored.get(tensor.name) or stored["model.embed_tokens.weight"]
            row_bytes = tensor.nbytes // tensor.shape[0]
            step = max(1, BLOCK_BYTES // row_bytes)
            for start in range(0, tensor.shape[0], step):
                rows = source.rows(start, min(start + step, tensor.shape[0])).to(TORCH_DTYPE[tensor.dtype])
                data: Any = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
                write_at(descriptor, data, shard.offsets[tensor.name] + start * row_bytes)
                written += len(data)
                yield written
        os.fsync(descriptor)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    os.replace(unfinished, path)
    sync_folder(path.parent)
