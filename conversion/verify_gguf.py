"""GGUF files as they must be, for their comparison with a checkpoint (`verify_output`)."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grok1.conversion.gguf_header import describe, gguf_shards
from grok1.conversion.inputs import Checkpoint
from grok1.conversion.layout import Slab
from grok1.conversion.names import BLOCK_TYPES, KINDS, HubTensor, hub_tensors
from grok1.conversion.plan import Plan, written_config
from grok1.conversion.release import has_release_sizes
from grok1.conversion.shards import Shard
from grok1.conversion.streaming import BlockStream, Consumer
from grok1.errors import ConversionError
from grok1.files import StoredTensor
from grok1.gguf_files import GgufModel, dequantized, file_keys, read_gguf


def expected_gguf(out: Path, checkpoint: Checkpoint, tokenizer: Path | None) -> tuple[Plan | None, list[str]]:
    """The files of a model as they must be, given which one holds which tensor, and what is wrong with those there.

    Args:
        out: a GGUF file, or the folder of one model.
        checkpoint: that it was made from.
        tokenizer: the tokenizer.model that it was made with, if it has a vocabulary.

    Returns:
        None as the plan if the headers cannot be read.
    """
    try:
        model = read_gguf(out)
    except ConversionError as error:
        return None, [error.summary, *error.problems]
    config = checkpoint.config
    dtype, embedding = gguf_dtypes(model)
    tensors = hub_tensors(config, "gguf", dtype, embedding=embedding)
    place = {name: model.tensors[name].file if name in model.tensors else model.files[-1] for name in tensors}
    problems = [f"{name}: expected in a file, found in none" for name in tensors if name not in model.tensors]
    problems += [f"{name}: expected no such tensor, found one" for name in model.tensors.keys() - tensors.keys()]
    rounds = model.keys.get("general.description") == describe(BLOCK_TYPES.get(dtype, dtype), embedding, True)
    groups = [[tensor for name, tensor in tensors.items() if place[name] == file] for file in model.files]
    shards = gguf_shards(
        groups,
        config,
        tokenizer if "tokenizer.ggml.tokens" in model.keys else None,
        is_release=has_release_sizes(config),
        round_scales=rounds and dtype in BLOCK_TYPES,
    )
    shards = [dataclasses.replace(shard, name=file.name) for shard, file in zip(shards, model.files, strict=True)]
    folder = model.files[0].parent
    for shard in shards:
        problems += _file_problems(folder / shard.name, shard)
    written = written_config(config, dtype, "gguf", 0)
    plan = Plan(folder, dtype, "gguf", written, tokenizer, shards, frozenset(), {}, round_scales=True)
    return plan, problems


def gguf_dtypes(model: GgufModel) -> tuple[str, str]:
    """The precision that most matrices of a model have, and the dtype of its embedding."""
    matrices = {kind.gguf for kind in KINDS.values() if kind.quantised}
    found = Counter(tensor.dtype for name, tensor in model.tensors.items() if name.split(".", 2)[-1] in matrices)
    embedding = model.tensors.get(KINDS["embedding"].gguf)
    precisions = {block_type: dtype for dtype, block_type in BLOCK_TYPES.items()}
    precisions |= {"float32": "float32", "bfloat16": "bfloat16"}
    dtype = precisions.get(found.most_common(1)[0][0] if found else "", "int8")
    stored = embedding.dtype if isinstance(embedding, StoredTensor) else ""
    return dtype, stored if stored in ("float32", "bfloat16", "q8_0") else "float32"


def _file_problems(path: Path, shard: Shard) -> list[str]:
    """What is wrong with a file outside of its tensors: its size, its header, and the zeros between tensors."""
    size = path.stat().st_size
    problems = [] if size == shard.nbytes else [f"{path.name}: expected {shard.nbytes} bytes, found {size}"]
    ends = [shard.offsets[tensor.name] + tensor.nbytes for tensor in shard.tensors]
    begins = [*(shard.offsets[tensor.name] for tensor in shard.tensors[1:]), shard.nbytes]
    with path.open("rb") as file:
        found = file.read(len(shard.header))
        for end, begin in zip(ends, begins, strict=True):
            file.seek(end)
            if any(file.read(begin - end)):
                problems.append(f"{path.name}: expected zeros from byte {end} to {begin}, found something else")
    if found != shard.header:
        problems += _header_problems(path, shard, found)
    return problems


def _header_problems(path: Path, shard: Shard, found: bytes) -> list[str]:
    """The keys that differ, or the first byte."""
    with tempfile.TemporaryDirectory(prefix="grok1-verify-") as name:
        expected = Path(name) / "expected.gguf"
        with expected.open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
        ours, theirs = file_keys(expected), file_keys(path)
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        return [
            f"{path.name}: {key}: expected {_shown(ours.get(key))}, found {_shown(theirs.get(key))}"
            for key in differing
        ]
    at = next((i for i, (a, b) in enumerate(zip(shard.header, found, strict=False)) if a != b), len(found))
    return [f"{path.name}: expected another header, from byte {at} on"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class CheckedBlockStream(BlockStream):
    """A stream whose blocks of q8_0 are read again with the gguf package and compared with xAI's products.

    `wrong` counts the numbers that differ, by the name of the tensor: those of scales that were rounded.
    """

    def __init__(self, jobs: int, round_scales: bool):
        super().__init__(jobs, round_scales)
        self.wrong: Counter[str] = Counter()

    def _derive(self, consume: Consumer, tensor: HubTensor, slab: Slab, first: int, last: int, base: int) -> None:
        def consume_checked(tensor: HubTensor, position: int, rows: memoryview) -> None:
            consume(tensor, position, rows)
            if tensor.dtype == "q8_0" and slab.scales is not None:
                found = torch.from_numpy(dequantized(rows, tensor.dtype).view(np.int32))
                product = slab.rows(first, last, "float32", self.of_thread.scratch).view(torch.int32)
                self.wrong[tensor.name] += int((found.view(product.shape) != product).sum())

        super()._derive(consume_checked, tensor, slab, first, last, base)
