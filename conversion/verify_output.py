"""A converted folder against its source: everything is derived again and compared byte for byte."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from grok1.conversion.convert import (
    TOKENIZER_NAME,
    FolderSource,
    Plan,
    companion_files,
    resolve_config,
    resolve_tokenizer,
    source_files,
    written_config,
)
from grok1.conversion.journal import JOURNAL_NAME
from grok1.conversion.names import BITS, DTYPES, ITEMSIZE, LAYOUTS, HubTensor, checkpoint_entries, hub_tensors
from grok1.conversion.shards import INDEX_NAME, SAFETENSORS_DTYPE, Shard, make_shard
from grok1.conversion.streaming import BlockStream, available_cores
from grok1.conversion.xai.checkpoint import examine_folder, resolve_folder
from grok1.errors import CheckpointError, ConversionError
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import GROUP_SIZES, bits_and_group_size


TOKENIZER_NAMES = (TOKENIZER_NAME, "tokenizer.json", "tokenizer_config.json")
SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
# A header of the release has 2115 tensors in 350 KB.
MAX_HEADER_BYTES = 2**25

Described = tuple[str, tuple[int, ...]]  # dtype and shape of a tensor, as a header says them


def verify_output(
    out: str | os.PathLike[str],
    src: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Compares the folder `out` with what `convert` makes of `src`, in bounded memory.

    Compared are every shard with its header, the index, config, generation config, code, tokenizer files, card and
    LICENSE. Files that the converter does not write are not looked at.

    Args:
        out: a converted folder, of any dtype and layout.
        src: the checkpoint it was made from.
        config, tokenizer: as they were given to `convert`; looked for beside the checkpoint by default. A tokenizer
            that is not there is taken from the folder.
        jobs: worker threads; by default one a core.
        progress: called with (bytes compared, bytes in all), from any thread.

    Returns:
        One line for each file or tensor that differs; none if the folder is right.

    Raises:
        CheckpointError: the source itself is not whole.
    """
    out, src = Path(out), Path(src)
    folder = resolve_folder(src)
    grok_config = resolve_config(src, folder, config)
    files, source_problems = examine_folder(folder, checkpoint_entries(grok_config))
    if source_problems:
        raise CheckpointError(f"{src}: not whole, nothing can be compared with it", source_problems)
    source = FolderSource(files)
    if not out.is_dir():
        return [f"{out}: expected a converted folder, found none"]

    held = _held_tensors(out)
    group_size = _group_size(out)
    dtype, layout, tensors = _most_alike(grok_config, held, group_size)
    shards, problems = _expected_shards(out, held, tensors)
    if (out / JOURNAL_NAME).exists():
        problems.append(f"{JOURNAL_NAME}: expected a finished conversion, found an unfinished one")
    model = None
    if any((out / name).exists() for name in TOKENIZER_NAMES):
        model, problem = resolve_tokenizer(src, folder, tokenizer, False, grok_config.vocab_size)
        if model is None and tokenizer is None:
            model = out / TOKENIZER_NAMES[0]
        elif problem:
            problems += problem
    written = written_config(grok_config, dtype, group_size)
    plan = Plan(out, dtype, layout, 0, written, model, shards, frozenset(), {})
    if not shards:
        return problems
    problems += _companion_problems(plan)
    return problems + _compare(plan, source, jobs or available_cores(), progress)


def _held_tensors(out: Path) -> dict[str, dict[str, Described]]:
    """By shard the tensors that its header names, with dtype and shape; a header that cannot be read names none."""
    held = {}
    for path in sorted(out.iterdir()):
        if SHARD_NAME.fullmatch(path.name):
            described = _header(path)
            held[path.name] = {
                name: (value["dtype"], tuple(value["shape"]))
                for name, value in described.items()
                if isinstance(value, dict) and isinstance(value.get("dtype"), str) and _is_shape(value.get("shape"))
            }
    return held


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int for size in value)


def _header(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return {}
        try:
            described = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return {}
    return described if isinstance(described, dict) else {}


def _group_size(out: Path) -> int:
    """What config.json says, or the default where it does not."""
    try:
        found = bits_and_group_size(json.loads((out / "config.json").read_bytes()).get("quantization_config"))
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found[1] if found else GROUP_SIZES[0]


def _most_alike(
    config: GrokConfig, held: Mapping[str, Mapping[str, Described]], group_size: int
) -> tuple[str, str, dict[str, HubTensor]]:
    """The dtype and layout that most of the folder's tensors agree with: one damaged name or dtype misleads nobody."""
    found = {item for shard in held.values() for item in shard.items()}
    divides = all(e.shape[-2] % group_size == 0 for e in checkpoint_entries(config) if e.kind.quantised)
    candidates = {
        (dtype, layout): hub_tensors(config, layout, dtype, group_size)
        for dtype in DTYPES
        for layout in (("hub",) if dtype in BITS else LAYOUTS)
        if dtype not in BITS or divides
    }

    def agreement(settings: tuple[str, str]) -> int:
        expected = {(t.name, (SAFETENSORS_DTYPE[t.dtype], t.shape)) for t in candidates[settings].values()}
        return len(found & expected) - len(found ^ expected)

    best = max(candidates, key=agreement)
    return *best, candidates[best]


def _expected_shards(
    out: Path, held: Mapping[str, Mapping[str, Described]], tensors: Mapping[str, HubTensor]
) -> tuple[list[Shard], list[str]]:
    """The shards as they must be, given which one holds which tensor, and what is wrong with those on the disk.

    A header that is exactly what its names ask for is believed, for other shards the index is.
    """
    indexed = _index_map(out)
    counts = Counter(match[2] for name in {*held, *indexed.values()} if (match := SHARD_NAME.fullmatch(name)))
    count = counts.most_common(1)[0][0] if counts else "00000"
    names = [f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    place: dict[str, str] = {}
    for name in set(names) & held.keys():
        own = [tensors[tensor] for tensor in held[name] if tensor in tensors]
        if _starts_with(out / name, make_shard(name, own).header):
            place |= {tensor.name: name for tensor in own}
    if not names:
        return [], [f"{out}: expected model-00001-of-....safetensors and so on, found no shard and no index of any"]
    place = {tensor: place.get(tensor) or indexed.get(tensor, "") for tensor in tensors}
    problems = [f"{name}: expected {int(count)} shards, found one more" for name in sorted(held.keys() - set(names))]
    problems += [f"{tensor}: expected in a shard, found in none" for tensor in place if place[tensor] not in names]
    # A tensor that is nowhere is missed in the last shard.
    place = {tensor: name if name in names else names[-1] for tensor, name in place.items()}
    shards = [make_shard(name, [tensors[t] for t in tensors if place[t] == name]) for name in names]
    for shard in shards:
        path = out / shard.name
        if not path.is_file():
            problems.append(f"{shard.name}: expected {shard.nbytes} bytes, found no such file")
            continue
        if not _starts_with(path, shard.header):
            problems.append(f"{shard.name}: expected the header of {len(shard.tensors)} tensors, found another one")
        if path.stat().st_size != shard.nbytes:
            problems.append(f"{shard.name}: expected {shard.nbytes} bytes, found {path.stat().st_size}")
    return shards, problems


def _index_map(out: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((out / INDEX_NAME).read_bytes())["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _starts_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _companion_problems(plan: Plan) -> list[str]:
    """Writes the small files again, elsewhere, and compares."""
    problems = []
    with tempfile.TemporaryDirectory(prefix="grok1-verify-") as name:
        try:
            names = companion_files(Path(name), plan)
        except ConversionError as error:
            return [str(error)]
        for file in names:
            expected, path = (Path(name) / file).read_bytes(), plan.out / file
            found = path.read_bytes() if path.is_file() else None
            if found is None:
                problems.append(f"{file}: expected {len(expected)} bytes, found no such file")
            elif found != expected:
                problems.append(f"{file}: {_difference(expected, found)}")
    return problems


def _difference(expected: bytes, found: bytes) -> str:
    """Where two small files begin to differ: the key of a JSON object, or the byte."""
    try:
        theirs, ours = json.loads(found), json.loads(expected)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key) and not isinstance(ours.get(key), dict):
                return f"expected {key} {ours.get(key)!r}, found {theirs.get(key)!r}"
    except (ValueError, AttributeError, RecursionError):
        pass
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
    at = min(len(expected), len(found)) if at is None else at
    return f"expected {expected[at : at + 16]!r} at byte {at}, found {found[at : at + 16]!r}"


def _compare(plan: Plan, source: FolderSource, jobs: int, progress: Callable[[int, int], None] | None) -> list[str]:
    """Derives every tensor again and compares it with the folder's."""
    present = [shard for shard in plan.shards if (plan.out / shard.name).is_file()]
    total = sum(tensor.nbytes for shard in present for tensor in shard.tensors)
    lock = threading.Lock()
    done = 0
    # By tensor: the shard, the first byte that differs and how many do.
    wrong: dict[str, tuple[Shard, int, int]] = {}

    def compare(shard: Shard, descriptor: int, tensor: HubTensor, position: int, expected: memoryview) -> None:
        nonlocal done
        found = np.frombuffer(os.pread(descriptor, len(expected), position).ljust(len(expected), b"\0"), np.uint8)
        differing = np.flatnonzero(found != np.frombuffer(expected, np.uint8))
        with lock:
            done += len(expected)
            if len(differing):
                _, first, count = wrong.get(tensor.name, (shard, position + int(differing[0]), 0))
                wrong[tensor.name] = (shard, min(first, position + int(differing[0])), count + len(differing))
            if progress is not None:
                progress(done, total)

    with BlockStream(jobs) as stream:
        for shard in present:
            with (plan.out / shard.name).open("rb") as file:
                files = {index: source.open(index) for index in source_files(shard)}
                stream.run(shard, files, partial(compare, shard, file.fileno()))
    tensors = {tensor.name: tensor for shard in present for tensor in shard.tensors}
    return [
        f"{name}: {count} bytes differ from the source, the first at byte {first} of {shard.name}, "
        f"element {(first - shard.offsets[name]) // ITEMSIZE[tensors[name].dtype]}"
        for name, (shard, first, count) in sorted(wrong.items())
    ]
