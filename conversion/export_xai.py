"""A converted folder back to xAI's format: the table of names read from right to left.

Tensors that are stored as in the release (float32 norms, routers and embedding; int8 with scales, as q8_0 too) are
restored byte for byte. Dequantised matrices are quantised again, which is lossy: the report states the error. One
expert is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grok1.arrays import RawArray, count_nonfinite, folder_arrays
from grok1.conversion.blocks import split_q8_0
from grok1.conversion.gguf_header import config_of_keys
from grok1.conversion.inputs import read_config
from grok1.conversion.journal import JOURNAL_NAME, LOCK_NAME, claimed, output_problems
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
from grok1.conversion.plan import COMPANION_BYTES
from grok1.conversion.streaming import available_cores
from grok1.conversion.tokenizer import TOKENIZER_NAME
from grok1.conversion.write import AGAIN
from grok1.conversion.xai.checkpoint import check_unchanged
from grok1.conversion.xai.writer import TensorFrame, tensor_frame, write_tensor_file
from grok1.errors import ConversionError
from grok1.files import (
    BLOCK_BYTES,
    PARTIAL_SUFFIX,
    FileState,
    Progress,
    array_bytes,
    read_json,
    sync_folder,
    unwritable,
    write_file,
)
from grok1.gguf_files import dequantized, gguf_arrays, is_gguf, read_gguf
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import bits_and_group_size, merge_scales, quantise_int8, unpack
from modeling_grok1.quantized_grok1 import dequantise


FOLDER_NAME = "ckpt-0"
UNFINISHED_NAME = f"{FOLDER_NAME}{PARTIAL_SUFFIX}"
PROGRESS_NAME = f".grok1-export.json{PARTIAL_SUFFIX}"
# Elements in a block of a worker: 4 MiB in float32, with at most six such temporaries.
BLOCK_ELEMENTS = 2**20
SAMPLED_ROWS = 16
# What a config says about its folder only: how its weights are stored and where their code is.
NOT_IN_CONFIG = ("auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version")


class _UnfitError(ConversionError):
    """The weights themselves cannot be exported: running again does not help."""


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

    def add(self, other: Loss) -> None:
        """Takes in the error of other files."""
        self.files += other.files
        self.elements += other.elements
        self.total += other.total
        self.largest = max(self.largest, other.largest)
        self.largest_in_steps = max(self.largest_in_steps, other.largest_in_steps)


@dataclass
class ExportReport:
    """The result of an export.

    Args:
        folder: where the tensor files are.
        files, nbytes: all of them.
        exact: how many hold exactly the stored numbers, as xAI would have written them.
        widened: names of files whose numbers were stored in bfloat16 where xAI has float32.
        losses: by kind, for matrices that were quantised again.
        is_finished: whether an earlier run finished the export; then only `folder`, `files` and `nbytes` are known.
    """

    folder: Path
    files: int = 0
    nbytes: int = 0
    exact: int = 0
    widened: list[str] = field(default_factory=list)
    losses: dict[str, Loss] = field(default_factory=dict)
    is_finished: bool = False

    def add(self, file: _File, loss: Loss) -> None:
        """Counts a file that was written."""
        self.files += 1
        self.nbytes += file.frame.size
        if loss.files:
            self.losses.setdefault(file.entry.kind.name, Loss()).add(loss)
        elif file.entry.kind.quantised or (file.weights[0].dtype == "float32" and not file.blocks):
            self.exact += 1
        else:
            self.widened.append(file.entry.file)


@dataclass(frozen=True)
class _File:
    """One file to be written: its matrices as the folder holds them, expert by expert, and their scales if int8.

    `bits` of packed matrices; `blocks` is the type of GGUF's, whose matrices are rows of bytes, scales included.
    `is_exact`: whether they are xAI's own int8 values and scales.
    """

    entry: Entry
    frame: TensorFrame
    weights: tuple[RawArray, ...]
    scales: tuple[RawArray, ...]
    bits: int | None
    blocks: str = ""
    is_exact: bool = False


def export_xai(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    scale_blocks: int = 8,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes the model in `folder` to `out`/ckpt-0 in xAI's format, with config.json and tokenizer.model beside it.

    The files appear together: until the last one is written they are in `out`/ckpt-0.partial. Run again after an
    interruption, it resumes; run again after it finished, it returns at once.

    Args:
        folder: a converted folder in any layout, in bfloat16, float32, int8 or int4; or a GGUF file.
        out: a folder that does not exist or is empty.
        scale_blocks: row blocks that get scales of their own, in the attention output and the experts' down matrices
            (the release: 8). The other matrices have one. Int8 folders keep their scales, one for each block of groups
            that have the same.
        jobs: worker threads; by default one per core.
        progress: called with (bytes written, bytes in all).

    Raises:
        ConversionError: `out` is not empty, the folder is not a complete Grok-1, or xAI's code cannot compute the
            model; with all problems, before any work. Or a matrix is not finite: then what was written is removed.
        CheckpointError: a file of the folder changed while it was read.
    """
    folder, out = Path(folder), Path(out)
    plan, problems = _plan_export(folder, scale_blocks)
    if not problems and _is_finished(plan, out):
        return ExportReport(out / FOLDER_NAME, len(plan.files), plan.nbytes, is_finished=True)
    problems = _place_problems(out, plan) + problems
    if problems:
        raise ConversionError(f"{folder}: cannot be exported to {out}", problems, "Nothing was written.")
    created = not out.exists()
    try:
        with claimed(out, plan.record):
            return _run(plan, out, jobs or available_cores(), progress)
    except _UnfitError:
        shutil.rmtree(out if created else out / UNFINISHED_NAME, ignore_errors=True)
        for name in () if created else (JOURNAL_NAME, LOCK_NAME, PROGRESS_NAME):
            (out / name).unlink(missing_ok=True)
        raise
    except OSError as error:
        raise unwritable(out, error, AGAIN) from error


def _run(plan: _Plan, out: Path, jobs: int, progress: Progress | None) -> ExportReport:
    """Writes the files that an earlier run did not finish; those appear together at the end."""
    report = ExportReport(out / FOLDER_NAME)
    unfinished, done = out / UNFINISHED_NAME, _Progress(out / PROGRESS_NAME)
    renamed = report.folder.exists()  # an earlier run ended after all files were written
    if renamed and not done.path.is_file():  # and after everything else
        return ExportReport(report.folder, len(plan.files), plan.nbytes, is_finished=True)
    if not renamed:
        unfinished.mkdir(parents=True, exist_ok=True)
    with _Writer(jobs) as writer:
        for file in plan.files:
            path = unfinished / file.entry.file
            loss = done.get(file) if renamed or _has_bytes(path, file) else None
            if loss is None and not renamed:
                loss = writer.write(file, path)
                for source in {array.file for array in (*file.weights, *file.scales)}:
                    check_unchanged(source, plan.states[source])
                done.put(file, loss)
            report.add(file, loss or Loss())
            if progress is not None:
                progress(report.nbytes, plan.nbytes)
    for name, content in plan.companions.items():
        write_file(out / name, content)
    if not renamed:
        os.replace(unfinished, report.folder)
        sync_folder(out)
    (out / PROGRESS_NAME).unlink(missing_ok=True)
    return report


class _Progress:
    """The finished files of an unfinished export, with the losses of those that were quantised again."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.losses: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            self.losses = {}

    def get(self, file: _File) -> Loss | None:
        """The loss of a file that an earlier run finished; None of another one."""
        values = self.losses.get(file.entry.file)
        return None if values is None else Loss(**values)

    def put(self, file: _File, loss: Loss) -> None:
        self.losses[file.entry.file] = dataclasses.asdict(loss)
        write_file(self.path, json.dumps(self.losses) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Plan


@dataclass(frozen=True)
class _Plan:
    """An export that was checked.

    Args:
        files: to be written.
        companions: the small files beside them, by name.
        states: of the shards, when their headers were read.
        record: what the journal says.
    """

    files: list[_File]
    companions: dict[str, bytes]
    states: dict[Path, FileState]
    record: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(file.frame.size for file in self.files)


def _plan_export(folder: Path, scale_blocks: int) -> tuple[_Plan, list[str]]:
    packing = None
    if is_gguf(folder):
        model = read_gguf(folder)
        folder = model.files[0].parent
        config = read_config(folder / "config.json") if (folder / "config.json").is_file() else config_of_keys(model)
        found = gguf_arrays(model)
        if "output.weight" in found:  # llama.cpp's own converter writes the tied head
            found[HEAD_NAME] = found.pop("output.weight")
    else:
        config = read_config(folder / "config.json")
        packing = bits_and_group_size(read_json(folder / "config.json").get("quantization_config"))
        found = folder_arrays(folder)
    states = {path: FileState.of(path) for path in {array.file for array in found.values()}}
    files, head, problems = _plan_files(found, config, packing, scale_blocks)
    problems = _model_problems(config) + problems
    if head is not None and files:
        problems += _head_problems(head, files[0].weights[0])
    companions = _companions(folder, config)
    record = {
        "settings": {
            "scale_blocks": scale_blocks,
            "version": version("modeling-grok1"),
            **{name: hashlib.sha256(content).hexdigest() for name, content in companions.items()},
        },
        "source": {path.name: state.lasting for path, state in sorted(states.items())},
    }
    return _Plan(files, companions, states, record), problems


def _model_problems(config: GrokConfig) -> list[str]:
    """What xAI's code computes otherwise: these are constants in it, one line per problem."""
    rope = config.rope_parameters or {}
    expected = {
        "attn_logit_softcapping": (config.attn_logit_softcapping, 30.0),
        "rope_parameters.rope_theta": (rope.get("rope_theta"), 10000.0),
        "rope_parameters.rope_type": (rope.get("rope_type"), "default"),
        "rms_norm_eps": (config.rms_norm_eps, 1e-5),
        "num_experts": (config.num_experts, 8),
        "hidden_act": (config.hidden_act, "gelu_pytorch_tanh"),
        "router_logit_softcapping": (config.router_logit_softcapping or 0.0, 0.0),
        "norm_topk_prob": (config.norm_topk_prob, False),
        "moe_router_renormalize": (config.moe_router_renormalize, False),
        "residual_moe": (config.residual_moe, False),
        "tie_word_embeddings": (config.tie_word_embeddings, True),
    }
    problems = [
        f"{name}: expected {value!r}, a constant of xAI's code, found {found!r}"
        for name, (found, value) in expected.items()
        if found != value
    ]
    if config.intermediate_size % 8:
        problems.append(
            f"intermediate_size: expected a multiple of 8, as xAI's code rounds it, found {config.intermediate_size}"
        )
    return problems


def _is_finished(plan: _Plan, out: Path) -> bool:
    """Whether an earlier run finished this export: all files have their sizes, and the small ones their bytes."""
    if (out / JOURNAL_NAME).exists() or not (out / FOLDER_NAME).is_dir():
        return False
    written = min((path.stat().st_mtime_ns for path in (out / FOLDER_NAME).iterdir()), default=0)
    if any(max(state.mtime_ns, state.ctime_ns) > written for state in plan.states.values()):
        return False
    for name, content in plan.companions.items():
        if not (out / name).is_file() or (out / name).read_bytes() != content:
            return False
    names = {file.entry.file for file in plan.files}
    if {path.name for path in (out / FOLDER_NAME).iterdir()} != names:
        return False
    return all(_has_bytes(out / FOLDER_NAME / file.entry.file, file) for file in plan.files)


def _has_bytes(path: Path, file: _File) -> bool:
    if not path.is_file() or path.stat().st_size != file.frame.size:
        return False
    with path.open("rb") as stream:
        if stream.read(len(file.frame.before)) != file.frame.before:
            return False
        if file.entry.kind.name.startswith(("norm", "router")):
            return all(stream.read(piece.nbytes) == piece.tobytes() for piece in _float_pieces(file))
    return True


def _place_problems(out: Path, plan: _Plan) -> list[str]:
    problems = output_problems(out, plan.record)
    existing = next(place for place in (out, *out.absolute().parents) if place.is_dir())
    if not os.access(existing, os.W_OK):
        return [f"{out}: expected a place that can be written, found {existing} to be read-only"]
    free = shutil.disk_usage(existing).free
    done = sum(path.stat().st_size for path in (out / UNFINISHED_NAME).glob("tensor*"))
    needed = plan.nbytes - min(done, plan.nbytes) + COMPANION_BYTES
    return problems + ([f"{out}: expected {needed:,} bytes of free disk, found {free:,}"] if free < needed else [])


def _plan_files(
    found: dict[str, RawArray], config: GrokConfig, packing: tuple[int, int] | None, scale_blocks: int
) -> tuple[list[_File], RawArray | None, list[str]]:
    """The files to be written, the head if the folder has one, and every problem."""
    found = dict(found)
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
        blocks = _stored_blocks(parts, found) if packing and packing[0] == 8 else _sampled_blocks(parts, found)
        for entry in checkpoint_entries(config):
            wanted = blocks.get(entry.kind.name, scale_blocks if entry.kind.scale_blocks > 1 else 1)
            bits = packing[0] if packing else None
            file, problem = _file(entry, parts[entry.index], found, bits, wanted, entry.kind.name in blocks)
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
    if array.dtype in BLOCK_BYTES and tensor.dtype == "float32" and array.shape == tensor.shape:
        return []
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


def _sampled_blocks(parts: dict[int, list[tuple[HubTensor, Part]]], found: dict[str, RawArray]) -> dict[str, int]:
    """By kind, the scale blocks of matrices in q8_0 whose scales are xAI's, from the first rows of each matrix.

    The scales lie between the values, so that all of them are seen, and checked, when the values are read.
    """
    blocks: dict[str, int] = {}
    foreign = set()
    for pairs in parts.values():
        for tensor, part in pairs:
            if found[tensor.name].dtype != "q8_0" or not part.entry.kind.quantised:
                continue
            rows = _piece(tensor, part, found[tensor.name])
            _, scales = split_q8_0(torch.from_numpy(rows.read_rows((), 0, min(SAMPLED_ROWS, rows.shape[0]))))
            kind, own = part.entry.kind.name, scales.to(torch.bfloat16)
            if not torch.equal(own.to(torch.float16), scales):
                foreign.add(kind)
            blocks[kind] = math.lcm(blocks.get(kind, 1), merge_scales(own).shape[-1])
    return {kind: count for kind, count in blocks.items() if kind not in foreign}


def _file(
    entry: Entry,
    parts: list[tuple[HubTensor, Part]],
    found: dict[str, RawArray],
    bits: int | None,
    blocks: int,
    is_exact: bool,
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
    stored = found[parts[0][0].name].dtype
    block_type = stored if stored in BLOCK_BYTES else ""
    weights, scales = tuple(pieces["weight"]), tuple(pieces["scales"])
    return _File(entry, frame, weights, scales, bits, block_type, is_exact), ""


def _piece(tensor: HubTensor, part: Part, array: RawArray) -> RawArray:
    """The rows of a stored tensor that are one part: a matrix (out, in) or (out, G), or a vector."""
    if len(tensor.shape) == 1:
        return array
    stored = part.entry.shape[-2:]
    rows = stored[1] if part.entry.kind.transposed else stored[0]
    offset = array.offset + array_bytes(array.dtype, part.offset)
    if array.dtype in BLOCK_BYTES:
        return RawArray(array.file, "uint8", (rows, array_bytes(array.dtype, tensor.shape[-1])), offset)
    return RawArray(array.file, array.dtype, (rows, tensor.shape[-1]), offset)


# ---------------------------------------------------------------------------------------------------------------------
# Write


class _Writer:
    """Writes one file after the other, the blocks of each expert on all workers. A context manager."""

    def __init__(self, jobs: int):
        self.lock = threading.Lock()
        self.workers = ThreadPoolExecutor(jobs, "grok1-export")
        self.threads_before = torch.get_num_threads()
        # The workers are the parallelism: torch must not start threads inside each operator.
        torch.set_num_threads(1)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads_before)

    def write(self, file: _File, path: Path) -> Loss:
        """Writes a file; returns its loss, which is empty if it was not quantised again."""
        loss = Loss()
        if not file.entry.kind.quantised:
            write_tensor_file(path, file.frame, _float_pieces(file))
            return loss
        assert file.frame.scales_shape is not None
        scales = np.empty((len(file.weights), *file.frame.scales_shape[-2:]), np.uint16)
        if file.is_exact and file.blocks:
            fill = partial(_split, file, scales)
        elif file.is_exact:
            for expert, array in enumerate(file.scales):
                stored = array.read()
                scales[expert] = stored[:, :: stored.shape[1] // scales.shape[1]].T
            fill = partial(_turn, file)
        else:
            loss.files = 1
            fill = partial(self.requantise, file, scales, loss)
        write_tensor_file(path, file.frame, self.matrices(file, fill), lambda: scales)
        return loss

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
            raise _UnfitError(
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
            raise _UnfitError(
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


def _split(file: _File, scales: np.ndarray, expert: int, matrix: np.ndarray, start: int, stop: int) -> None:
    """Rows (out, in) of q8_0 to columns of the matrix and of the expert's scales (G, out)."""
    array = file.weights[expert]
    values, stored = split_q8_0(torch.from_numpy(array.read_rows((), start, stop)))
    grouped = stored.unflatten(-1, (scales.shape[1], -1))
    first = grouped[..., 0].to(torch.bfloat16)
    if not torch.equal(first.to(torch.float16).unsqueeze(-1).expand_as(grouped), grouped):
        raise _UnfitError(
            f"{array.file}: cannot be exported",
            [f"{file.entry.path}: expected {scales.shape[1]} scales of xAI in each row, found others"],
            "Its blocks have scales of their own: it was quantised again after it was converted.",
        )
    matrix[:, start:stop] = transpose(values).numpy()
    scales[expert, :, start:stop] = first.T.contiguous().view(torch.int16).numpy().view(np.uint16)


def _matrix_rows(file: _File, expert: int, start: int, stop: int) -> torch.Tensor:
    """Rows (out, in) of a matrix in float32, exact."""
    if file.blocks:
        return _block_rows(file, expert, start, stop)
    if file.bits is None:
        return _float_rows(file.weights[expert], start, stop)
    packed = torch.from_numpy(file.weights[expert].read_rows((), start, stop))
    scales = as_tensor(file.scales[expert].read_rows((), start, stop), "bfloat16")
    return dequantise(unpack(packed, file.bits), scales, torch.float32)


def _float_pieces(file: _File) -> Iterator[np.ndarray]:
    """The float32 bytes of an embedding, norm or router. Raises _UnfitError if they are not finite."""
    (array,) = file.weights
    whole = not file.blocks and (len(array.shape) == 1 or file.entry.kind.transposed)
    for start, stop in [(0, array.shape[0])] if whole else _row_blocks(array):
        rows = _block_rows(file, 0, start, stop) if file.blocks else _float_rows(array, start, stop)
        if not rows.isfinite().all():
            raise _UnfitError(
                f"{array.file}: cannot be exported",
                [f"{file.entry.path}: expected finite weights, found NaN or infinity in rows {start} to {stop}"],
            )
        yield (transpose(rows) if file.entry.kind.transposed else rows).numpy()


def _block_rows(file: _File, expert: int, start: int, stop: int) -> torch.Tensor:
    """Rows of blocks in float32, as the gguf package reads them."""
    rows = file.weights[expert].read_rows((), start, stop)
    return torch.from_numpy(dequantized(rows, file.blocks)).view(stop - start, -1)


def _row_blocks(array: RawArray, bits: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of rows with a bounded number of elements, of which an integer holds several if they are packed."""
    rows, columns = array.shape
    columns *= 1 if bits is None else 32 // bits
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _float_rows(array: RawArray, start: int, stop: int) -> torch.Tensor:
    return as_tensor(array.read_rows((), start, stop), array.dtype).to(torch.float32)


def _head_problems(head: RawArray, embedding: RawArray) -> list[str]:
    """xAI's format has no head of its own. One in blocks is not compared: llama.cpp quantises both in other ways."""
    if head.dtype in BLOCK_BYTES or embedding.dtype == "uint8":
        return []
    for start, stop in _row_blocks(embedding):
        if not torch.equal(_float_rows(head, start, stop), _float_rows(embedding, start, stop)):
            return [
                f"{HEAD_NAME}: expected the embedding, to which xAI ties it, found other rows in {start} to {stop}"
            ]
    return []


def _companions(folder: Path, config: GrokConfig) -> dict[str, bytes]:
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else config.to_dict()
    values = {key: value for key, value in values.items() if key not in NOT_IN_CONFIG}
    companions = {"config.json": (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()}
    if (folder / TOKENIZER_NAME).is_file():
        companions[TOKENIZER_NAME] = (folder / TOKENIZER_NAME).read_bytes()
    return companions
