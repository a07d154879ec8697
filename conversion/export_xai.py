"""A converted folder back to xAI's format: the table of names read from right to left.

Tensors that are stored as in the release (float32 norms, routers and embedding; int8 with scales) are restored byte
for byte. Dequantised matrices are quantised again, which is lossy: the report states the error. One expert is in
memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from grok1.arrays import RawArray, count_nonfinite, folder_arrays
from grok1.conversion.inputs import read_config
from grok1.conversion.layout import as_tensor, transpose
from grok1.conversion.names import (
    HEAD_NAME,
    LAYOUTS,
    Entry,
    HubTensor,
    Part,
    checkpoint_entries,
    hub_tensors,
    parts_by_entry,
)
from grok1.conversion.streaming import available_cores
from grok1.conversion.tokenizer import TOKENIZER_NAME
from grok1.conversion.xai.writer import TensorFrame, tensor_frame, write_tensor_file
from grok1.errors import ConversionError
from grok1.files import ITEMSIZE, PARTIAL_SUFFIX, Progress, write_file
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import bits_and_group_size, merge_scales, quantise_int8, unpack
from modeling_grok1.quantized_grok1 import dequantise


FOLDER_NAME = "ckpt-0"
# Elements in a block of a worker: 4 MiB in float32, with at most six such temporaries.
BLOCK_ELEMENTS = 2**20
# What a config says about its folder only: how its weights are stored and where their code is.
NOT_IN_CONFIG = ("auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version")


@dataclass
class Loss:
    """The error of requantised matrices of one kind: |w - q * scale|."""

    files: int = 0
    elements: int = 0
    total: float = 0.0
    largest: float = 0.0
    largest_in_steps: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.elements if self.elements else 0.0


@dataclass
class ExportReport:
    """The result of an export.

    Args:
        folder: where the tensor files are.
        files, nbytes: all of them.
        exact: how many hold exactly the stored numbers, as xAI would have written them.
        widened: names of files whose numbers were stored in bfloat16 where xAI has float32.
        losses: by kind, for matrices that were quantised again.
    """

    folder: Path
    files: int = 0
    nbytes: int = 0
    exact: int = 0
    widened: list[str] = field(default_factory=list)
    losses: dict[str, Loss] = field(default_factory=dict)


@dataclass(frozen=True)
class _File:
    """One file to be written: its matrices as the folder holds them, expert by expert, and their scales if int8."""

    entry: Entry
    frame: TensorFrame
    weights: tuple[RawArray, ...]
    scales: tuple[RawArray, ...]
    bits: int | None

    @property
    def is_exact(self) -> bool:
        """Whether the folder holds xAI's own int8 values and scales."""
        return self.bits == 8


def export_xai(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale_blocks: int = 8,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes the model in `folder` to `out`/ckpt-0 in xAI's format, with config.json and tokenizer.model beside it.

    The files appear together: until the last one is written they lie in `out`/ckpt-0.partial.

    Args:
        folder: a converted folder in any layout, in bfloat16, float32, int8 or int4.
        out: a folder that does not exist or is empty.
        scale_blocks: row blocks that get scales of their own, in the attention output and the experts' down matrices
            (the release: 8). The other matrices have one. Int8 folders keep their scales, one for each block of groups
            that have the same.
        jobs: worker threads; by default one per core.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConversionError: `out` is not empty, or the folder is not a whole Grok-1; with all problems, before any work.
            Or a matrix is not finite, or the head is not the embedding: then what was written is removed.
    """
    folder, out = Path(folder), Path(out)
    config = read_config(folder / "config.json")
    packing = bits_and_group_size(json.loads((folder / "config.json").read_bytes()).get("quantization_config"))
    files, head, problems = _plan(folder, config, packing, scale_blocks)
    total = sum(file.frame.size for file in files)
    problems = _place_problems(out, total) + problems
    if problems:
        raise ConversionError(f"{folder}: cannot be exported to {out}", problems, "Nothing was written.")

    report = ExportReport(out / FOLDER_NAME)
    unfinished = out / f"{FOLDER_NAME}{PARTIAL_SUFFIX}"
    created = not out.exists()
    unfinished.mkdir(parents=True)
    try:
        if head is not None:
            _check_head(head, files[0].weights[0])
        with _Writer(jobs or available_cores(), report) as writer:
            for file in files:
                writer.write(file, unfinished / file.entry.file)
                if progress is not None:
                    progress(report.nbytes, total)
        _write_companions(folder, out)
        os.replace(unfinished, out / FOLDER_NAME)
    except BaseException:
        shutil.rmtree(out if created else unfinished, ignore_errors=True)
        raise
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def _place_problems(out: Path, needed: int) -> list[str]:
    if os.path.lexists(out) and not out.is_dir():
        return [f"{out}: expected a folder or nothing, found a file"]
    if out.is_dir() and any(out.iterdir()):
        return [f"{out}: expected an empty folder or none, found {sum(1 for _ in out.iterdir())} entries"]
    existing = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    if not os.access(existing, os.W_OK):
        return [f"{out}: expected a place that can be written, found {existing} to be read-only"]
    free = shutil.disk_usage(existing).free
    return [f"{out}: expected {needed} bytes of free disk, found {free}"] if free < needed else []


def _plan(
    folder: Path, config: GrokConfig, packing: tuple[int, int] | None, scale_blocks: int
) -> tuple[list[_File], RawArray | None, list[str]]:
    """The files to be written, the head if the folder has one, and every problem."""
    found = folder_arrays(folder)
    head = found.pop(HEAD_NAME, None)
    tensors = _expected(config, packing, set(found))
    problems = [f"{name}: expected a tensor {t.shape}, found none" for name, t in tensors.items() if name not in found]
    problems += [f"{name}: expected only Grok-1's tensors, found this one too" for name in found.keys() - tensors]
    for name in tensors.keys() & found.keys():
        problems += _tensor_problems(tensors[name], found[name])
    if head is not None and head.shape != (config.vocab_size, config.hidden_size):
        problems.append(f"{HEAD_NAME}: expected {(config.vocab_size, config.hidden_size)}, found {head.shape}")
    if scale_blocks < 1:
        problems.append(f"scale_blocks: expected a positive number, found {scale_blocks}")
    files: list[_File] = []
    if not problems:
        parts = parts_by_entry(tensors.values())
        blocks = _stored_blocks(parts, found) if packing and packing[0] == 8 else {}
        for entry in checkpoint_entries(config):
            wanted = blocks.get(entry.kind.name, scale_blocks if entry.kind.scale_blocks > 1 else 1)
            file, problem = _file(entry, parts[entry.index], found, packing[0] if packing else None, wanted)
            files += [] if file is None else [file]
            problems += [problem] if problem else []
    return files, head, sorted(problems)


def _expected(config: GrokConfig, packing: tuple[int, int] | None, names: set[str]) -> dict[str, HubTensor]:
    """The tensors of the layout that shares most names with the folder, without the head."""
    if packing is not None:
        candidates = [hub_tensors(config, "hub", f"int{packing[0]}", packing[1])]
    else:
        candidates = [hub_tensors(config, layout, "float32") for layout in LAYOUTS]
    best = max(candidates, key=lambda tensors: len(names & tensors.keys()))
    return {name: tensor for name, tensor in best.items() if name != HEAD_NAME}


def _tensor_problems(tensor: HubTensor, array: RawArray) -> list[str]:
    if tensor.dtype != "float32":
        dtypes: tuple[str, ...] = (tensor.dtype,)
    else:
        dtypes = ("float32", "bfloat16")
    if array.shape != tensor.shape or array.dtype not in dtypes:
        expected = f"{' or '.join(dtypes)} {tensor.shape}"
        return [f"{tensor.name}: expected {expected}, found {array.dtype} {array.shape}"]
    if tensor.parts[0].field == "scales":
        bad = count_nonfinite(array.read(), array.dtype)
        return [f"{tensor.name}: expected finite scales, found {bad} that are NaN or infinite"] if bad else []
    if tensor.parts[0].field == "shape":
        matrix, shape = tensor.parts[0].entry.shape[:-3:-1], tuple(array.read().tolist())
        return [f"{tensor.name}: expected {matrix}, found {shape}"] if shape != matrix else []
    return []


def _stored_blocks(parts: dict[int, list[tuple[HubTensor, Part]]], found: dict[str, RawArray]) -> dict[str, int]:
    """By kind, the fewest scale blocks that hold the scales of all its matrices."""
    blocks: dict[str, int] = {}
    for pairs in parts.values():
        for tensor, part in pairs:
            if part.field == "scales":
                scales = as_tensor(found[tensor.name].read(), "bfloat16")
                kind = part.entry.kind.name
                blocks[kind] = math.lcm(blocks.get(kind, 1), merge_scales(scales).shape[-1])
    return blocks


def _file(
    entry: Entry,
    parts: list[tuple[HubTensor, Part]],
    found: dict[str, RawArray],
    bits: int | None,
    blocks: int,
) -> tuple[_File | None, str]:
    pieces: dict[str, list[RawArray]] = {"weight": [], "scales": [], "shape": []}
    for tensor, part in sorted(parts, key=lambda pair: pair[1].expert or 0):
        array = found[tensor.name]
        pieces[part.field].append(array if tensor.packing else _piece(tensor, part, array))
    scales_shape = None
    if entry.kind.quantised:
        if blocks < 1 or entry.shape[-2] % blocks:
            return None, f"{entry.path}: expected scale blocks that divide its {entry.shape[-2]} rows, found {blocks}"
        scales_shape = entry.scales_shape(blocks)
    frame = tensor_frame(entry.shape, scales_shape)
    return _File(entry, frame, tuple(pieces["weight"]), tuple(pieces["scales"]), bits), ""


def _piece(tensor: HubTensor, part: Part, array: RawArray) -> RawArray:
    """The rows of a stored tensor that are one part: a matrix (out, in) or (out, G), or a vector."""
    if len(tensor.shape) == 1:
        return array
    stored = part.entry.shape[-2:]
    rows = stored[1] if part.entry.kind.transposed else stored[0]
    offset = array.offset + part.offset * ITEMSIZE[array.dtype]
    return RawArray(array.file, array.dtype, (rows, tensor.shape[-1]), offset)


# ---------------------------------------------------------------------------------------------------------------------
# Write


class _Writer:
    """Writes one file after the other, the blocks of each expert on all workers. A context manager."""

    def __init__(self, jobs: int, report: ExportReport):
        self.report, self.lock = report, threading.Lock()
        self.workers = ThreadPoolExecutor(jobs, "grok1-export")
        self.threads_before = torch.get_num_threads()
        # The workers are the parallelism: torch must not start threads inside each operator.
        torch.set_num_threads(1)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads_before)

    def write(self, file: _File, path: Path) -> None:
        if not file.entry.kind.quantised:
            write_tensor_file(path, file.frame, _float_pieces(file))
            if file.weights[0].dtype == "float32":
                self.report.exact += 1
            else:
                self.report.widened.append(file.entry.file)
        else:
            assert file.frame.scales_shape is not None
            scales = np.empty((len(file.weights), *file.frame.scales_shape[-2:]), np.uint16)
            if file.is_exact:
                for expert, array in enumerate(file.scales):
                    stored = array.read()
                    scales[expert] = stored[:, :: stored.shape[1] // scales.shape[1]].T
                fill = partial(_turn, file)
                self.report.exact += 1
            else:
                loss = self.report.losses.setdefault(file.entry.kind.name, Loss())
                loss.files += 1
                fill = partial(self.requantise, file, scales, loss)
            write_tensor_file(path, file.frame, self.matrices(file, fill), lambda: scales)
        self.report.files += 1
        self.report.nbytes += file.frame.size

    def matrices(self, file: _File, fill: Callable[[int, np.ndarray, int, int], None]) -> Iterator[np.ndarray]:
        """Each expert's matrix (in, out) in one buffer; `fill(expert, matrix, start, stop)` writes its columns."""
        matrix = np.empty(file.frame.shape[-2:], np.int8)
        for expert, array in enumerate(file.weights):
            blocks = [
                self.workers.submit(fill, expert, matrix, start, stop) for start, stop in _row_blocks(array, file.bits)
            ]
            for block in blocks:
                block.result()
            yield matrix

    def requantise(
        self, file: _File, scales: np.ndarray, loss: Loss, expert: int, matrix: np.ndarray, start: int, stop: int
    ) -> None:
        """Rows (out, in) of the folder to columns of the matrix and of the expert's scales (G, out)."""
        rows = _matrix_rows(file, expert, start, stop)
        values, scale = quantise_int8(rows, scales.shape[1])
        # NaN and infinity are carried into the largest value of their block.
        if not torch.isfinite(scale).all():
            raise ConversionError(
                f"{file.weights[expert].file}: cannot be exported",
                [f"{file.entry.path}: expected finite weights, found NaN or infinity in rows {start} to {stop}"],
            )
        matrix[:, start:stop] = transpose(values).numpy()
        scales[expert, :, start:stop] = scale.T.contiguous().view(torch.int16).numpy().view(np.uint16)

        error = (dequantise(values, scale, torch.float32) - rows).abs_()
        worst = error.unflatten(-1, (scale.shape[-1], -1)).amax(dim=-1)
        steps = torch.where(worst > 0, worst / scale.float(), 0.0).max().item()
        # float32 rounds the quotient: a value in the middle between two steps may be that much over.
        if steps > 0.5 + 1e-4:
            raise ConversionError(
                f"{file.weights[expert].file}: cannot be exported",
                [f"{file.entry.path}: expected an error of half a step, found {steps:.3f} (weights near 1e-38)"],
            )
        with self.lock:
            loss.elements += error.numel()
            loss.total += error.sum(dim=-1).sum(dtype=torch.float64).item()
            loss.largest = max(loss.largest, worst.max().item())
            loss.largest_in_steps = max(loss.largest_in_steps, steps)


def _turn(file: _File, expert: int, matrix: np.ndarray, start: int, stop: int) -> None:
    """Packed int8 rows (out, in) to columns of the matrix."""
    rows = torch.from_numpy(file.weights[expert].read_rows((), start, stop))
    matrix[:, start:stop] = transpose(unpack(rows, 8)).numpy()


def _matrix_rows(file: _File, expert: int, start: int, stop: int) -> torch.Tensor:
    """Rows (out, in) of a matrix in float32, exact."""
    if file.bits is None:
        return _float_rows(file.weights[expert], start, stop)
    packed = torch.from_numpy(file.weights[expert].read_rows((), start, stop))
    scales = as_tensor(file.scales[expert].read_rows((), start, stop), "bfloat16")
    return dequantise(unpack(packed, file.bits), scales, torch.float32)


def _float_pieces(file: _File) -> Iterator[np.ndarray]:
    """The float32 bytes of an embedding, norm or router."""
    (array,) = file.weights
    if len(array.shape) == 1:
        yield _float_rows(array, 0, array.shape[0]).numpy()
    elif file.entry.kind.transposed:
        yield transpose(_float_rows(array, 0, array.shape[0])).numpy()
    else:
        for start, stop in _row_blocks(array):
            yield _float_rows(array, start, stop).numpy()


def _row_blocks(array: RawArray, bits: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows with a bounded number of elements, of which an integer holds several if they are packed."""
    rows, columns = array.shape
    columns *= 1 if bits is None else 32 // bits
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _float_rows(array: RawArray, start: int, stop: int) -> torch.Tensor:
    return as_tensor(array.read_rows((), start, stop), array.dtype).to(torch.float32)


def _check_head(head: RawArray, embedding: RawArray) -> None:
    """xAI's format has no head of its own."""
    for start, stop in _row_blocks(embedding):
        if not torch.equal(_float_rows(head, start, stop), _float_rows(embedding, start, stop)):
            raise ConversionError(
                f"{head.file}: cannot be exported",
                [f"{HEAD_NAME}: expected the embedding (rows {start} to {stop}), found another head"],
                "xAI's format ties the head to the embedding: this model would lose its head.",
            )


def _write_companions(folder: Path, out: Path) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {key: value for key, value in values.items() if key not in NOT_IN_CONFIG}
    write_file(out / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    if (folder / TOKENIZER_NAME).is_file():
        write_file(out / TOKENIZER_NAME, (folder / TOKENIZER_NAME).read_bytes())
