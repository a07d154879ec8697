"""The contents of a folder of xAI's checkpoint, from headers alone; the download may be incomplete."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grok1.conversion.inputs import refuse_grok2_folder
from grok1.conversion.names import BLOCK_KINDS, TOP_KINDS, Kind, checkpoint_entries
from grok1.conversion.release import ReleaseFile, release_files
from grok1.conversion.xai.checkpoint import (
    TENSOR_FILE,
    TensorFile,
    foreign_entries,
    list_files,
    mismatches,
    read_tensor_file,
    resolve_folder,
    surplus_files,
)
from grok1.errors import CheckpointError


@dataclass
class KindSummary:
    """The files of one kind of tensor.

    `readable` of `expected` are present and valid; `nbytes` counts all that are present. `shapes` are those of weight
    and scales as stored, e.g. "int8 (8, 6144, 32768), scales (8, 1, 32768)".
    """

    kind: str
    path: str
    expected: int
    present: int = 0
    readable: int = 0
    nbytes: int = 0
    shapes: list[str] = field(default_factory=list)


@dataclass
class Inspection:
    """The result of `inspect_checkpoint`.

    Args:
        folder: where the tensor files are.
        is_release: whether the shapes, or the sizes of finished files, are those of the released checkpoint.
        layers: in the whole checkpoint; 64 in the release, else what the highest file number implies.
        sizes: V, D, F, E, Q and KV (see `names`) as far as the tensors show them.
        kinds: a summary for each of the 14 kinds.
        missing: names of files that are not there.
        problems: everything else, one line each: expected and found.
    """

    folder: Path
    is_release: bool
    layers: int
    sizes: dict[str, int]
    kinds: list[KindSummary]
    missing: list[str]
    problems: list[str]

    @property
    def expected(self) -> int:
        return sum(kind.expected for kind in self.kinds)

    @property
    def readable(self) -> int:
        return sum(kind.readable for kind in self.kinds)

    @property
    def nbytes(self) -> int:
        return sum(kind.nbytes for kind in self.kinds)

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        totals = {"expected": self.expected, "readable": self.readable, "nbytes": self.nbytes}
        return {**asdict(self), "folder": str(self.folder), **totals, "is_whole": self.is_whole}


def inspect_checkpoint(source: str | os.PathLike[str], release: Iterable[ReleaseFile] | None = None) -> Inspection:
    """Reads the header of every file that is present; neither a config nor a complete download is needed.

    Args:
        source: the folder that holds the tensor files, or the one above its ckpt-0/ or ckpt/.
        release: what was published; by default the table of the package.

    Raises:
        CheckpointError: there is no tensor file at all.
        ConversionError: the folder is one of Grok-2.
    """
    refuse_grok2_folder(Path(source))
    folder = resolve_folder(source)
    published = {file.entry.file: file for file in (release_files() if release is None else release)}
    problems, refused = foreign_entries(folder)
    present = {path.name: path for path in list_files(folder) if path.name not in refused}
    damaged: dict[str, str] = {}
    tensors: dict[str, TensorFile] = {}
    for name, path in present.items():
        try:
            tensors[name] = read_tensor_file(path)
        except CheckpointError as error:
            damaged[name] = error.problems[0]
    on_disk = {name: _size(path) for name, path in present.items()}

    is_release = _is_release(tensors, on_disk, published)
    sizes = _sizes(tensors)
    if is_release:
        entries = [file.entry for file in published.values()]
        for name in damaged:
            if name in published and on_disk[name] != published[name].size:
                damaged[name] = _unfinished(name, on_disk[name], published[name].size)
    else:
        entries = checkpoint_entries(_config(sizes, _layers(present)))
    problems += surplus_files(present, entries)
    kinds = {kind.name: KindSummary(kind.name, kind.path, 0) for kind in (*TOP_KINDS, *BLOCK_KINDS)}
    missing = []
    for entry in entries:
        summary = kinds[entry.kind.name]
        summary.expected += 1
        if entry.file not in present:
            if entry.file not in refused:
                missing.append(entry.file)
            continue
        summary.present += 1
        summary.nbytes += on_disk[entry.file]
        tensor = tensors.get(entry.file)
        wrong = [damaged[entry.file]] if tensor is None else mismatches(entry, tensor, read_scales=False)
        problems += wrong
        if tensor is not None and not wrong:
            summary.readable += 1
            if (shape := _described(tensor)) not in summary.shapes:
                summary.shapes.append(shape)
    layers = sum(entry.kind is BLOCK_KINDS[0] for entry in entries)
    return Inspection(folder, is_release, layers, sizes, list(kinds.values()), missing, sorted(problems))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _unfinished(name: str, found: int, expected: int) -> str:
    share = "over-long" if found > expected else f"{100 * found // expected} % of it"
    return f"{name}: expected {expected} bytes, found {found} ({share})"


def _described(tensor: TensorFile) -> str:
    scales = "" if tensor.scales is None else f", scales {tensor.scales.shape}"
    return f"{tensor.weight.dtype} {tensor.weight.shape}{scales}"


def _kind(name: str) -> Kind:
    """The kind of a file: every block has the same twelve, whatever its layer."""
    match = TENSOR_FILE.fullmatch(name)
    assert match
    index = int(match[1])
    return TOP_KINDS[index] if index < len(TOP_KINDS) else BLOCK_KINDS[(index - len(TOP_KINDS)) % len(BLOCK_KINDS)]


def _is_release(tensors: dict[str, TensorFile], on_disk: dict[str, int], published: dict[str, ReleaseFile]) -> bool:
    """Whether most readable files have the shapes of the release; if none is readable, whether one has its size."""
    known = [name for name in tensors if name in published]
    if known:
        return 2 * sum(tensors[name].weight.shape == published[name].entry.shape for name in known) > len(known)
    return any(name in published and size == published[name].size for name, size in on_disk.items())


def _sizes(tensors: dict[str, TensorFile]) -> dict[str, int]:
    """Each symbol of the table as most files have it."""
    seen: dict[str, Counter[int]] = {}
    for name, tensor in tensors.items():
        kind = _kind(name)
        if len(kind.shape) == len(tensor.weight.shape):
            for symbol, size in zip(kind.shape, tensor.weight.shape, strict=True):
                seen.setdefault(symbol, Counter())[size] += 1
    return {symbol: counts.most_common(1)[0][0] for symbol, counts in sorted(seen.items())}


def _layers(present: Iterable[str]) -> int:
    last = max(int(name[6:11]) for name in present)
    return max(1, -(-(last + 1 - len(TOP_KINDS)) // len(BLOCK_KINDS)))


def _config(sizes: dict[str, int], layers: int) -> Any:
    """Sizes for `checkpoint_entries`. A symbol that no tensor shows is 0: nothing is compared with it."""
    return SimpleNamespace(
        vocab_size=sizes.get("V", 0),
        hidden_size=sizes.get("D", 0),
        intermediate_size=sizes.get("F", 0),
        num_hidden_layers=layers,
        num_attention_heads=sizes.get("Q", 0),
        num_key_value_heads=sizes.get("KV", 0),
        head_dim=1,
        num_experts=sizes.get("E", 0),
    )
