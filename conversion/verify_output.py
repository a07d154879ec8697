"""A converted folder against its source: everything is converted again and compared byte for byte."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from grok1.conversion.companions import companion_files
from grok1.conversion.inputs import Checkpoint, beside, find_folder, find_tokenizer
from grok1.conversion.journal import JOURNAL_NAME
from grok1.conversion.names import BITS, DTYPES, SAFETENSORS_LAYOUTS, HubTensor, checkpoint_entries, hub_tensors
from grok1.conversion.plan import Plan, source_files, written_config
from grok1.conversion.ports import Source
from grok1.conversion.settings import Settings
from grok1.conversion.shards import Shard, make_shard
from grok1.conversion.streaming import available_cores
from grok1.conversion.tokenizer import TOKENIZER_NAME
from grok1.conversion.verify_gguf import CheckedBlockStream, expected_gguf
from grok1.conversion.verify_sums import verify_sums
from grok1.conversion.xai.checkpoint import resolve_folder
from grok1.errors import CheckpointError, ConversionError
from grok1.files import (
    BLOCK_BYTES,
    BLOCK_SIZE,
    INDEX_NAME,
    ITEMSIZE,
    SUMS_NAME,
    Progress,
    read_at,
    read_safetensors_header,
)
from grok1.gguf_files import is_gguf
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import GROUP_SIZES, bits_and_group_size


TOKENIZER_NAMES = (TOKENIZER_NAME, "tokenizer.json", "tokenizer_config.json")
SHARD_NAME = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

Described = tuple[str, tuple[int, ...]]  # dtype and shape of a tensor


def verify_output(
    out: str | os.PathLike[str],
    src: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Compares the folder `out` with what `convert` makes of `src`, in bounded memory.

    Compared are every shard with its header, the index, config, generation config, code, tokenizer files, card and
    LICENSE. Files that the converter does not write are ignored. Of a GGUF file only itself and its other splits are
    compared. The blocks of q8_0 are also read with the gguf package, and compared with xAI's products bit by bit.

    Args:
        out: a converted folder, of any dtype and layout, or a GGUF file.
        src: the checkpoint that it was made from.
        config, tokenizer: as they were given to `convert`; by default those beside the checkpoint. If there is no
            tokenizer, the one in the folder is used.
        jobs: worker threads; by default one per core.
        progress: called with (bytes compared, bytes in all), from any thread.

    Returns:
        One line per file or tensor that differs; none if the folder is right.

    Raises:
        CheckpointError: the source itself is not complete.
    """
    out = Path(out)
    settings = Settings(config=config, tokenizer=tokenizer)
    checkpoint = find_folder(src, out, dataclasses.replace(settings, no_tokenizer=True))
    if checkpoint.file_problems:
        raise CheckpointError(f"{src}: not complete, nothing can be compared with it", checkpoint.file_problems)
    if not out.is_dir() and not is_gguf(out):
        return [f"{out}: expected a converted folder or a GGUF file, found none"]

    model, problems = _tokenizer(out, src, settings, checkpoint.config)
    plan: Plan | None
    if is_gguf(out):
        plan, file_problems = expected_gguf(out, checkpoint, model)
    else:
        plan, file_problems = _expected_folder(out, checkpoint, model)
    problems = file_problems + problems
    if plan is None or not plan.shards:
        return problems
    if out.is_dir():
        if (out / JOURNAL_NAME).exists():
            problems.append(f"{JOURNAL_NAME}: expected a finished conversion, found an unfinished one")
        problems += _companion_problems(plan)
    problems += _compare(plan, checkpoint.source, jobs or available_cores(), progress)
    return problems + (_sum_problems(out, problems) if out.is_dir() else [])


def _expected_folder(out: Path, checkpoint: Checkpoint, tokenizer: Path | None) -> tuple[Plan, list[str]]:
    """A folder of safetensors as it must be, and what is wrong with its shards."""
    held = _held_tensors(out)
    group_size = _group_size(out)
    dtype, layout, tensors = _most_alike(checkpoint.config, held, group_size)
    shards, problems = _expected_shards(out, held, tensors)
    written = written_config(checkpoint.config, dtype, layout, group_size)
    return Plan(out, dtype, layout, written, tokenizer, shards, frozenset(), {}), problems


def _sum_problems(out: Path, known: list[str]) -> list[str]:
    """What is wrong with the folder's sums, without the files that are known to be wrong."""
    if not (out / SUMS_NAME).is_file():
        return [f"{SUMS_NAME}: expected the sums of all files, found no such file"]
    try:
        found = verify_sums(out).problems
    except ConversionError as error:
        return [f"{SUMS_NAME}: {problem}" for problem in error.problems]
    return [] if known else found


def _tokenizer(
    out: Path, src: str | os.PathLike[str], settings: Settings, config: GrokConfig
) -> tuple[Path | None, list[str]]:
    """The tokenizer.model that the folder was made with, if it has a tokenizer, and what is wrong with it."""
    folder = out if out.is_dir() else out.parent
    if out.is_dir() and not any((out / name).exists() for name in TOKENIZER_NAMES):
        return None, []
    candidates = beside(Path(src), resolve_folder(src), TOKENIZER_NAME)
    model, problems = find_tokenizer(candidates, settings, config.vocab_size)
    if model is None and settings.tokenizer is None:
        own = folder / TOKENIZER_NAME
        return (own if own.is_file() or out.is_dir() else None), []
    return model, problems


def _held_tensors(out: Path) -> dict[str, dict[str, Described]]:
    """The tensors of each shard with dtype and shape; none for a shard whose header does not describe it."""
    held: dict[str, dict[str, Described]] = {}
    for path in sorted(out.iterdir()):
        if SHARD_NAME.fullmatch(path.name):
            try:
                tensors = read_safetensors_header(path)
            except (OSError, ValueError):
                tensors = {}
            held[path.name] = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return held


def _group_size(out: Path) -> int:
    """The group size in config.json, or the default where it has none."""
    try:
        found = bits_and_group_size(json.loads((out / "config.json").read_bytes()).get("quantization_config"))
    except (OSError, ValueError, AttributeError, RecursionError):
        found = None
    return found[1] if found else GROUP_SIZES[0]


def _most_alike(
    config: GrokConfig, held: Mapping[str, Mapping[str, Described]], group_size: int
) -> tuple[str, str, dict[str, HubTensor]]:
    """The dtype and layout that most of the folder's tensors agree with, so that one damaged name does not matter."""
    found = {item for shard in held.values() for item in shard.items()}
    divides = all(e.shape[-2] % group_size == 0 for e in checkpoint_entries(config) if e.kind.quantised)
    candidates = {
        (dtype, layout): hub_tensors(config, layout, dtype, group_size)
        for dtype in DTYPES
        for layout in (("hub",) if dtype in BITS else SAFETENSORS_LAYOUTS)
        if dtype not in BITS or divides
    }

    def agreement(settings: tuple[str, str]) -> int:
        expected = {(t.name, (t.dtype, t.shape)) for t in candidates[settings].values()}
        return len(found & expected) - len(found ^ expected)

    best = max(candidates, key=agreement)
    return *best, candidates[best]


def _expected_shards(
    out: Path, held: Mapping[str, Mapping[str, Described]], tensors: Mapping[str, HubTensor]
) -> tuple[list[Shard], list[str]]:
    """The shards as they must be, given which one holds which tensor, and what is wrong with those on the disk.

    A header that is exactly the one of its tensors is trusted; for other shards the index is.
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
    # A tensor that is nowhere is reported as missing in the last shard.
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
    """Writes the small files again, to a temporary folder, and compares."""
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


def _compare(plan: Plan, source: Source, jobs: int, progress: Progress | None) -> list[str]:
    """Converts every tensor again and compares it with the folder's."""
    present = [shard for shard in plan.shards if (plan.out / shard.name).is_file()]
    total = sum(tensor.nbytes for shard in present for tensor in shard.tensors)
    lock = threading.Lock()
    done = 0
    # By tensor: the shard, the first byte that differs and how many do.
    wrong: dict[str, tuple[Shard, int, int]] = {}

    def compare(shard: Shard, descriptor: int, tensor: HubTensor, position: int, expected: memoryview) -> None:
        nonlocal done
        found = np.frombuffer(read_at(descriptor, len(expected), position).ljust(len(expected), b"\0"), np.uint8)
        differing = np.flatnonzero(found != np.frombuffer(expected, np.uint8))
        with lock:
            done += len(expected)
            if len(differing):
                _, first, count = wrong.get(tensor.name, (shard, position + int(differing[0]), 0))
                wrong[tensor.name] = (shard, min(first, position + int(differing[0])), count + len(differing))
            if progress is not None:
                progress(done, total)

    with CheckedBlockStream(jobs, plan.round_scales) as stream:
        for shard in present:
            with (plan.out / shard.name).open("rb") as file:
                files = {index: source.open(index) for index in source_files(shard)}
                stream.run(shard, files, partial(compare, shard, file.fileno()))
    tensors = {tensor.name: tensor for shard in present for tensor in shard.tensors}
    return [
        f"{name}: {count} bytes differ from the source, the first at byte {first} of {shard.name}, "
        f"element {_element(tensors[name].dtype, first - shard.offsets[name])}"
        for name, (shard, first, count) in sorted(wrong.items())
    ] + [
        f"{name}: {count} numbers are not those of the source, whose scales float16 does not hold"
        for name, count in sorted(stream.wrong.items())
        if count and name not in wrong
    ]


def _element(dtype: str, byte: int) -> int:
    """The number that a byte of a tensor belongs to; in blocks, the first number of the block."""
    return byte // BLOCK_BYTES[dtype] * BLOCK_SIZE if dtype in BLOCK_BYTES else byte // ITEMSIZE[dtype]
