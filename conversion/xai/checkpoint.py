"""Reads xAI's checkpoint: a folder of 770 files `tensorNNNNN_000`, one tensor each.

Nothing is unpickled: `xai.pickle` locates the arrays of a file from its opcodes, and their bytes are read afterwards
by position (`grok1.arrays.RawArray`).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from grok1.arrays import RawArray, count_nonfinite
from grok1.conversion.names import Entry
from grok1.conversion.xai.pickle import RefusedPickleError, locate_arrays
from grok1.errors import CheckpointError
from grok1.files import BINARY, NONBLOCK, FileState, link_out_of, read_at


TENSOR_FILE = re.compile(r"tensor(\d{5})_000")
# What may lie beside the tensors without being reported. Hidden files are ignored.
COMPANIONS = frozenset({"config.json", "about.json", "tokenizer.model", "README.md", "LICENSE", "LICENSE.txt"})


@dataclass(frozen=True)
class TensorFile:
    """One file of the checkpoint: its state when the header was read, and where its arrays are.

    `weight` is float32 and `scales` is None, or `weight` is int8 (..., K, N) and `scales` bfloat16 (..., G, N) with K
    a multiple of G: scale row g covers the input rows [g * K/G, (g + 1) * K/G).
    """

    path: Path
    state: FileState
    weight: RawArray
    scales: RawArray | None

    def check_unchanged(self) -> None:
        """Raises CheckpointError if the file was changed or replaced since its header was read."""
        check_unchanged(self.path, self.state)


def check_unchanged(path: Path, state: FileState) -> None:
    """Raises CheckpointError if the state of a source file is not what it was."""
    try:
        found = FileState.of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read any more: {error.strerror}") from error
    if found != state:
        raise CheckpointError(
            f"{path}: changed while it was being read",
            [f"{path.name}: expected {_described(state)}, found {_described(found)}"],
            "Leave the source unchanged while it is read, and run the command again.",
        )


def _described(state: FileState) -> str:
    return f"{state.size} bytes, modified at {state.mtime_ns} ns, changed at {state.ctime_ns} ns, inode {state.inode}"


def read_tensor_file(path: str | os.PathLike[str]) -> TensorFile:
    """Locates the arrays of one file from its header, in a few small reads whatever the size of the file.

    Raises:
        CheckpointError: the file is not exactly one tensor as xAI writes it: empty, zero-filled, truncated, over-long,
            referring to another global, of another dtype, order or protocol. It names file, expected and found.
    """
    path = Path(path)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | NONBLOCK | BINARY)
    except OSError as error:
        raise _refusal(path, "a readable file", f"an error: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _refusal(path, "a regular file", "something else")
        state = FileState.of(descriptor)
        weight, scales = locate_arrays(lambda offset, count: read_at(descriptor, count, offset), state.size)
    except RefusedPickleError as refused:
        raise _refusal(path, refused.expected, refused.found, refused.next_step) from None
    except OSError as error:
        raise _refusal(path, "a readable file", f"an error: {error.strerror}") from error
    finally:
        os.close(descriptor)
    return TensorFile(
        path=path,
        state=state,
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


def foreign_entries(folder: Path) -> tuple[list[str], set[str]]:
    """Problems of the folder itself: unknown entries, and tensor files that are links out of it (`link_out_of`).

    Returns:
        One line per problem, and the names of the tensor files that must not be opened.
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
    """Reads every header of `folder` and compares it with the sizes of the model.

    Args:
        folder: the folder that holds the files (`resolve_folder`).
        entries: the files that must be there (`names.checkpoint_entries(config)`).

    Returns:
        The readable files by their index, and all problems, one line each: missing, damaged and unknown files, links
        out of the folder, wrong shapes and dtypes, scales that are NaN or infinite. For that the scales are read whole
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
        bad = count_nonfinite(tensor.scales.read(), "bfloat16")
        if bad:
            return [f"{entry.file}: expected finite scales in {entry.path}, found {bad} that are NaN or infinite"]
    return []
