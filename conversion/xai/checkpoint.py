"""Reads xAI's checkpoint: a folder of 770 files `tensorNNNNN_000`, one tensor each.

Nothing is unpickled: `xai_pickle` locates the arrays of a file from its opcodes, and their bytes are read afterwards
by position, in blocks as small as the caller likes (`RawArray.read_rows`), from any number of threads.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.names import ITEMSIZE, Entry
from grok1.conversion.xai.pickle import RefusedPickleError, locate_arrays
from grok1.errors import CheckpointError


# numpy has no bfloat16: its bits are delivered as uint16.
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}

TENSOR_FILE = re.compile(r"tensor(\d{5})_000")
# What may lie beside the tensors without being reported. Hidden files are never looked at.
COMPANIONS = frozenset({"config.json", "about.json", "tokenizer.model", "README.md", "LICENSE", "LICENSE.txt"})


@dataclass(frozen=True)
class RawArray:
    """An array inside a file: C order, little-endian, `nbytes` bytes from `offset` on.

    `dtype` is "float32", "int8" or "bfloat16". The bits of bfloat16 are delivered as uint16.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def read_rows(self, lead: tuple[int, ...], start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Reads `array[lead][start:stop]`; safe to call from several threads.

        Args:
            lead: indices into the leading dimensions, e.g. `(expert,)` for an array (E, K, N); `()` for a matrix.
            start, stop: range of the dimension after those, 0 <= start <= stop <= its size.
            buffer: uint8, at least as many bytes as the rows; the result lies in it. Fresh memory by default.

        Raises:
            CheckpointError: the file ends before the rows do (it changed since its header was read).
        """
        axis = len(lead)
        if axis >= len(self.shape) or not 0 <= start <= stop <= self.shape[axis]:
            raise IndexError(f"rows {start}:{stop} of {lead} in an array {self.shape}")
        row = 0
        for index, size in zip(lead, self.shape, strict=False):
            if not 0 <= index < size:
                raise IndexError(f"rows {start}:{stop} of {lead} in an array {self.shape}")
            row = row * size + index
        row = row * self.shape[axis] + start
        row_bytes = math.prod(self.shape[axis + 1 :]) * ITEMSIZE[self.dtype]
        shape, dtype = (stop - start, *self.shape[axis + 1 :]), NUMPY_DTYPE[self.dtype]
        rows = np.empty(shape, dtype) if buffer is None else np.ndarray(shape, dtype, buffer)
        _read_exactly(self.file, self.offset + row * row_bytes, rows)
        return rows

    def read(self) -> np.ndarray:
        """Reads the whole array: for norms, routers and scales."""
        return self.read_rows((), 0, self.shape[0])


def _read_exactly(path: Path, offset: int, array: np.ndarray) -> None:
    if array.nbytes == 0:
        return
    view = array.data.cast("B")
    done = 0
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if done < len(view):
        raise CheckpointError(
            f"{path}: changed while it was being read",
            [f"{path.name}: expected at least {offset + len(view)} bytes, found {offset + done}"],
        )


@dataclass(frozen=True)
class TensorFile:
    """One file of the checkpoint: its size and time when the header was read, and where its arrays are.

    `weight` is float32 and `scales` is None, or `weight` is int8 (..., K, N) and `scales` bfloat16 (..., G, N) with K
    a multiple of G: scale row g covers the input rows [g * K/G, (g + 1) * K/G).
    """

    path: Path
    size: int
    mtime_ns: int
    weight: RawArray
    scales: RawArray | None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file has another size or modification time than when its header was read."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read any more: {error.strerror}") from error
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError(
                f"{self.path}: changed while it was being read",
                [
                    f"{self.path.name}: expected {self.size} bytes, modified at {self.mtime_ns} ns, "
                    f"found {found.st_size} bytes, modified at {found.st_mtime_ns} ns"
                ],
            )


def read_tensor_file(path: str | os.PathLike[str]) -> TensorFile:
    """Locates the arrays of one file from its header, in a few small reads whatever the size of the file.

    Raises:
        CheckpointError: the file is not exactly one tensor as xAI writes it: empty, zero-filled, truncated, over-long,
            referring to another global, of another dtype, order or protocol. It names file, expected and found.
    """
    path = Path(path)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise _refusal(path, "a readable file", f"an error: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(path, "a regular file", "something else")
        return _parse(
            path, lambda offset, count: os.pread(descriptor, count, offset), status.st_size, status.st_mtime_ns
        )
    finally:
        os.close(descriptor)


def parse_tensor(data: bytes, name: str = "tensor") -> TensorFile:
    """Like `read_tensor_file`, for bytes in memory: the offsets of the result are positions in `data`."""
    return _parse(Path(name), lambda offset, count: data[offset : offset + count], len(data), 0)


def _parse(path: Path, read_at: Callable[[int, int], bytes], size: int, mtime_ns: int) -> TensorFile:
    try:
        weight, scales = locate_arrays(read_at, size)
    except RefusedPickleError as refused:
        raise _refusal(path, refused.expected, refused.found, refused.next_step) from None
    except OSError as error:
        raise _refusal(path, "a readable file", f"an error: {error.strerror}") from error
    return TensorFile(
        path=path,
        size=size,
        mtime_ns=mtime_ns,
        weight=RawArray(path, weight.dtype, weight.shape, weight.offset),
        scales=None if scales is None else RawArray(path, scales.dtype, scales.shape, scales.offset),
    )


def _refusal(path: Path, expected: str, found: str, next_step: str = "") -> CheckpointError:
    return CheckpointError(
        f"{path}: not a tensor file of xAI's checkpoint",
        [f"{path.name}: expected {expected}, found {found}"],
        next_step,
    )


def resolve_folder(source: str | os.PathLike[str]) -> Path:
    """The folder that holds the tensor files: `source` itself, or `ckpt-0/` or `ckpt/` below it.

    Raises:
        CheckpointError: none of the three holds a tensor file, or the one that does is a link out of `source`.
    """
    source = Path(source)
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing"
        raise CheckpointError(f"{source}: not a checkpoint", [f"expected a folder, found {found}"])
    candidates = [source, source / "ckpt-0", source / "ckpt"]
    for folder in candidates:
        if folder.is_dir() and any(TENSOR_FILE.fullmatch(entry.name) for entry in os.scandir(folder)):
            if folder.is_symlink() and folder != source and not folder.resolve().is_relative_to(source.resolve()):
                raise CheckpointError(
                    f"{folder}: a link out of the checkpoint",
                    [f"expected a folder inside {source}, found a link to {folder.resolve()}"],
                    f"If you trust it, name it as the checkpoint: {folder.resolve()}",
                )
            return folder
    raise CheckpointError(
        f"{source}: not a checkpoint",
        [f"expected tensor00000_000 and so on in {', '.join(map(str, candidates))}, found none"],
        "Give the folder that holds the tensor files, or the one above it.",
    )


def list_files(folder: Path) -> list[Path]:
    """The files of `folder` that are named tensorNNNNN_000, in order of their number, whatever they hold."""
    return sorted(folder / entry.name for entry in os.scandir(folder) if TENSOR_FILE.fullmatch(entry.name))


def link_out_of(path: Path) -> Path | None:
    """Where a link leads if it leaves its folder, else None.

    A link may end in its own folder, or in the `blobs` beside the `snapshots` that hold it: so does the cache of the
    Hugging Face hub store every file.
    """
    if not path.is_symlink():
        return None
    folder, target = path.parent.resolve(), path.resolve()
    allowed = [folder]
    allowed += [ancestor.parent / "blobs" for ancestor in folder.parents if ancestor.name == "snapshots"]
    return None if any(target.is_relative_to(root) for root in allowed) else target


def foreign_entries(folder: Path) -> tuple[list[str], set[str]]:
    """Problems of the folder itself: unknown entries, and tensor files that are links out of it (`link_out_of`).

    Returns:
        One line a problem, and the names of the tensor files that must not be opened.
    """
    problems, refused = [], set()
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if TENSOR_FILE.fullmatch(entry.name):
            outside = link_out_of(Path(entry.path))
            if outside:
                problems.append(f"{entry.name}: expected a file of this folder, found a link out of it, to {outside}")
                refused.add(entry.name)
        elif not entry.name.startswith(".") and entry.name not in COMPANIONS:
            what = "folder" if entry.is_dir() else "file"
            problems.append(f"{entry.name}: expected only tensorNNNNN_000, found an unknown {what}")
    return problems, refused


def examine_folder(folder: Path, entries: Iterable[Entry]) -> tuple[dict[int, TensorFile], list[str]]:
    """Reads every header of `folder` and compares it with what the sizes of the model ask for.

    Args:
        folder: the folder that holds the files (`resolve_folder`).
        entries: the files that must be there (`names.checkpoint_entries(config)`).

    Returns:
        The readable files by their index, and all problems, one line each: missing, damaged and unknown files, links
        out of the folder, wrong shapes and dtypes, scales that are NaN or infinite. The scales are read whole for it
        (120 MB in the release), the weights are not.
    """
    entries = list(entries)
    problems, refused = foreign_entries(folder)
    present = {path.name: path for path in list_files(folder)}
    problems += surplus_files(present, entries)
    tensors = {}
    for entry in entries:
        if entry.file not in present:
            problems.append(f"{entry.file}: expected {entry.path}, found no such file")
        elif entry.file not in refused:
            try:
                tensor = read_tensor_file(present[entry.file])
                problems += mismatches(entry, tensor)
            except CheckpointError as error:
                problems += error.problems or [str(error)]
            else:
                tensors[entry.index] = tensor
    return tensors, problems


def surplus_files(names: Iterable[str], entries: Sequence[Entry]) -> list[str]:
    """One line for each tensor file beyond those that a checkpoint of these sizes has."""
    known = {entry.file for entry in entries}
    return [
        f"{name}: expected {len(entries)} files, the last {entries[-1].file}, found one more"
        for name in names
        if name not in known
    ]


def mismatches(entry: Entry, tensor: TensorFile, read_scales: bool = True) -> list[str]:
    """What differs between a file and its entry: shape, dtype, scales that are NaN or infinite; one line each."""
    found = tensor.weight
    if (found.dtype, found.shape) != (entry.dtype, entry.shape):
        return [
            f"{entry.file}: expected {entry.path} as {entry.dtype} {entry.shape}, found {found.dtype} {found.shape}"
        ]
    if tensor.scales is not None and read_scales:
        bad = count_nonfinite(tensor.scales.read())
        if bad:
            return [f"{entry.file}: expected finite scales in {entry.path}, found {bad} that are NaN or infinite"]
    return []


def count_nonfinite(bfloat16_bits: np.ndarray) -> int:
    """How many of these bfloat16 numbers (uint16 bits) are NaN or infinite: all bits of the exponent are set."""
    return int(np.count_nonzero((bfloat16_bits & 0x7F80) == 0x7F80))
