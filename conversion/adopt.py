"""Weights of Grok-1 from other repositories, rewritten into the hub layout.

Reads the names of hpcai-tech/grok-1 and keyfan/grok-1-hf (and our own) from safetensors or .bin shards, and writes
what `grok1 convert` writes: the same names, order, companions and guarantees. A .bin shard is opened with
`torch.load(weights_only=True)` on the meta device, which runs no code and reads no weight; the bytes are then read by
position, in blocks of rows.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from grok1.arrays import RawArray, count_nonfinite
from grok1.conversion.companions import write_companions
from grok1.conversion.finished import finished, is_finished
from grok1.conversion.inputs import refuse_grok2
from grok1.conversion.journal import claimed, output_problems
from grok1.conversion.layout import TORCH_DTYPE, as_bytes, as_tensor
from grok1.conversion.names import HEAD_NAME, HubTensor, hub_tensors
from grok1.conversion.plan import Plan, space_problems, written_config
from grok1.conversion.ports import FolderSink
from grok1.conversion.settings import Settings
from grok1.conversion.shards import Shard, plan_shards
from grok1.conversion.sums import record_sum
from grok1.conversion.tokenizer import TOKENIZER_NAME
from grok1.conversion.write import AGAIN, finish_file
from grok1.errors import CheckpointError, ConversionError
from grok1.files import (
    BINARY,
    PARTIAL_SUFFIX,
    FileState,
    Progress,
    read_json,
    read_safetensors_header,
    sha256_of,
    unwritable,
    write_at,
)
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.loading_grok1 import ALIASES


BLOCK_BYTES = 64 * 2**20
# Files of one rank: pytorch_model-00000-007.bin, pytorch_model-00000-TP-007.safetensors.
PRESHARDED = re.compile(r"-(TP-)?(\d{3}|common)\.(bin|safetensors)$")
FLOATS = ("bfloat16", "float32")
EMBEDDING_NAME = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Stored:
    """A tensor of the folder: its name there, and where its bytes are."""

    name: str
    array: RawArray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass(frozen=True)
class Folder:
    """The weights of a repository: tensors by their names in the hub layout, and the state of each file."""

    tensors: dict[str, Stored]
    states: dict[Path, FileState]

    def changed_since(self, moment_ns: int) -> list[str]:
        """The files that changed after a moment, one line each."""
        return [
            f"{path}: changed after the conversion"
            for path, state in self.states.items()
            if max(state.mtime_ns, state.ctime_ns) > moment_ns
        ]


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
    """Rewrites `folder` as a hub folder `out`. Run again after an interruption, it resumes; run again
    after it finished, it returns at once, with `is_finished` in the plan.

    Matrices keep the dtype that most of them have (bfloat16 or float32); norms and routers become float32, which is
    exact from bfloat16. If the folder has no output head, a copy of the embedding is written: it is tied.

    Raises:
        ConversionError: the folder is not a complete Grok-1 (every missing, unknown or mis-shaped tensor is listed),
            or `out` is in use or full.
        CheckpointError: a file of the folder changed while it was read, or a weight in it is not finite.
    """
    folder, out = Path(folder), Path(out)
    plan, weights = _plan(folder, out, Settings(max_shard_size=max_shard_size))
    if is_finished(out):
        return finished(plan, FolderSink(), weights.changed_since, partial(_read, weights))
    try:
        with claimed(out, plan.record):
            done = 0
            for shard in plan.shards:
                if not FolderSink().has(shard, out):
                    for nbytes in _write_shard(out / shard.name, shard, weights):
                        if progress is not None:
                            progress(done + nbytes, plan.nbytes)
                done += shard.nbytes
            write_companions(plan)
    except OSError as error:
        raise unwritable(out, error, AGAIN) from error
    return plan


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def _plan(folder: Path, out: Path, settings: Settings) -> tuple[Plan, Folder]:
    problems = settings.problems()
    if problems:
        raise ConversionError(f"{folder}: cannot be adopted to {out}", problems, "Nothing was written.")
    config = _read_config(folder)
    weights, problems = _read_folder(folder)
    dtype = _main_dtype(weights)
    if dtype is None:
        problems.append(f"{folder}: expected matrices in bfloat16 or float32, found neither")
        dtype = "bfloat16"
    shards = plan_shards(hub_tensors(config, "hub", dtype).values(), settings.max_shard_bytes)
    problems += _mismatches(shards, weights.tensors)
    written = written_config(config, dtype, "hub", settings.inputs_per_scale)
    tokenizer = folder / TOKENIZER_NAME if (folder / TOKENIZER_NAME).is_file() else None
    record = {
        "settings": {
            "max_shard_size": settings.max_shard_bytes,
            "config": json.loads(written.to_json_string(use_diff=False)),
            "tokenizer": None if tokenizer is None else sha256_of(tokenizer),
        },
        "source": {file.name: state.lasting for file, state in sorted(weights.states.items())},
    }
    again = is_finished(out)
    problems += [] if again else output_problems(out, record)
    done = frozenset(shard.name for shard in shards if not problems and FolderSink().has(shard, out))
    plan = Plan(out, dtype, "hub", written, tokenizer, shards, done, record)
    problems += [] if again else space_problems(plan)
    if problems:
        raise ConversionError(f"{folder}: cannot be adopted to {out}", problems, "Nothing was written.")
    return plan, weights


def _read_config(folder: Path) -> GrokConfig:
    path = folder / "config.json"
    try:
        values = read_json(path)
        refuse_grok2(path, values)
        if (found := values.get("model_type")) not in (None, GrokConfig.model_type):
            raise ValueError(f"model_type: expected {GrokConfig.model_type!r} or none, found {found!r}")
        for key in ("architectures", "auto_map", "quantization_config"):
            values.pop(key, None)
        return GrokConfig.from_dict(values)
    except ConversionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ConversionError(f"{path}: not the config of a Grok-1", [str(error)]) from None


def _read_folder(folder: Path) -> tuple[Folder, list[str]]:
    """Every tensor of the folder by its name in the hub layout, and what cannot be read, one line per problem."""
    tensors: dict[str, Stored] = {}
    states: dict[Path, FileState] = {}
    problems = []
    twice: set[str] = set()  # files with a tensor that another file has
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        problems.append(f"{folder}: expected *.safetensors or *.bin files, found none")
    _refuse_presharded(folder, [file.name for file in files if PRESHARDED.search(file.name)])
    for file in files:
        try:
            states[file] = FileState.of(file)
            found = list(_safetensors(file) if file.suffix == ".safetensors" else _bin(file))
        except (OSError, ValueError) as error:
            problems.append(f"{file.name}: expected a file of tensors, found: {error}")
            continue
        for stored in found:
            name = hub_name(stored.name)
            if name in tensors:
                problems.append(
                    f"{file.name}: {stored.name} is {name}, which is in {tensors[name].array.file.name} already"
                )
                twice.add(file.name)
            tensors[name] = stored
    if len(twice) == len(files) - 1 > 0 and 2 * len(problems) > len(tensors):
        _refuse_presharded(folder, [file.name for file in files])
    return Folder(tensors, states), problems


def _refuse_presharded(folder: Path, files: list[str]) -> None:
    """Raises ConversionError if there are files with parts of tensors, one file per rank of tensor parallelism."""
    if files:
        raise ConversionError(
            f"{folder}: cannot be adopted: its weights are presharded for tensor parallelism",
            [
                f"expected whole tensors, found parts of them in {len(files)} files ({files[0]} and so on): SGLang's "
                "presharded sets cut w1 and w3 along rows and w2 along columns, one part per rank"
            ],
            "Convert xAI's checkpoint (`grok1 convert`), or adopt a repository with whole tensors, such as "
            "hpcai-tech/grok-1 or keyfan/grok-1-hf.",
        )


def _safetensors(file: Path) -> Iterator[Stored]:
    for name, tensor in read_safetensors_header(file).items():
        yield Stored(name, RawArray(file, tensor.dtype, tensor.shape, tensor.offset))


def _bin(file: Path) -> Iterator[Stored]:
    """The tensors of a file that `torch.save` wrote. Raises ValueError if it is something else."""
    if not file.is_file():
        raise ValueError("expected a regular file, found something else")
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
        found = torch.load(file, map_location="meta", weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise ValueError(str(error).split("\n")[0] or type(error).__name__) from None
    if packed or any(order != b"little" for order in orders):
        raise ValueError("compressed or big-endian tensors")
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} in place of tensors by name")
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"a {type(tensor).__name__} under the name {name!r}")
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None or not tensor.is_contiguous():
            raise ValueError(f"{name}, which is not one block of bytes in the file")
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield Stored(
            str(name), RawArray(file, dtype, tuple(tensor.shape), offset + tensor.storage_offset() * tensor.itemsize)
        )


def _main_dtype(weights: Folder) -> str | None:
    """The dtype of the matrices: the one with most elements."""
    sizes = dict.fromkeys(FLOATS, 0)
    for stored in weights.tensors.values():
        if stored.array.dtype in FLOATS and len(stored.shape) == 2:
            sizes[stored.array.dtype] += stored.shape[0] * stored.shape[1]
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
        f"{tensor.name}: expected bfloat16 or float32, found {tensor.array.dtype}"
        for name, tensor in stored.items()
        if name in expected and tensor.array.dtype not in FLOATS
    ]
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Write


def _write_shard(path: Path, shard: Shard, weights: Folder) -> Iterator[int]:
    """Writes a shard and yields the bytes written so far."""
    unfinished = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o644)
    used: set[Path] = set()
    try:
        write_at(descriptor, memoryview(shard.header), 0)
        written = len(shard.header)
        for tensor in shard.tensors:
            source = (weights.tensors.get(tensor.name) or weights.tensors[EMBEDDING_NAME]).array
            used.add(source.file)
            row_bytes = tensor.nbytes // tensor.shape[0]
            step = max(1, BLOCK_BYTES // row_bytes)
            for start in range(0, tensor.shape[0], step):
                stored = source.read_rows((), start, min(start + step, tensor.shape[0]))
                if bad := count_nonfinite(stored, source.dtype):
                    raise CheckpointError(
                        f"{source.file}: cannot be adopted",
                        [f"{tensor.name}: expected finite weights, found {bad} that are NaN or infinite"],
                        "Fetch the file again.",
                    )
                data = as_bytes(as_tensor(stored, source.dtype).to(TORCH_DTYPE[tensor.dtype]).contiguous())
                write_at(descriptor, data, shard.offsets[tensor.name] + start * row_bytes)
                written += len(data)
                yield written
    except BaseException:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)
        raise
    finish_file(descriptor, path, {file: weights.states[file] for file in used})
    record_sum(path)


def _read(weights: Folder, shard: Shard, tensor: HubTensor) -> bytes:
    """The bytes of a small tensor as they are written."""
    source = weights.tensors[tensor.name].array
    return bytes(as_bytes(as_tensor(source.read(), source.dtype).to(TORCH_DTYPE[tensor.dtype]).contiguous()))
