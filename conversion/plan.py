"""The plan of a conversion: every file that will be written, and every problem. Nothing is written here."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grok1.conversion.gguf_header import TEMPLATE_NAME, gguf_shards
from grok1.conversion.inputs import Checkpoint
from grok1.conversion.journal import output_problems
from grok1.conversion.names import BITS, checkpoint_entries, hub_tensors
from grok1.conversion.packing import group_size_problems, inexact_scale_problems
from grok1.conversion.ports import FolderSink, Sink
from grok1.conversion.release import has_release_sizes
from grok1.conversion.settings import Settings
from grok1.conversion.shards import Shard, fill_shards, plan_shards
from grok1.errors import CheckpointError, ConversionError
from grok1.files import BLOCK_BYTES, BLOCK_SIZE, PARTIAL_SUFFIX, sha256_of
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import quantization_dict


# Code, tokenizer, card: a generous bound.
COMPANION_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked and can begin.

    Args:
        out: the folder to be written.
        dtype, layout: as in `Settings`.
        config: as it will be written.
        tokenizer: tokenizer.model, or None to convert without.
        shards: every file of weights, complete with header and offsets.
        finished: names of the shards that an earlier run finished.
        record: what the journal says.
        scratch_bytes: disk space that the source takes in `out` while it is read.
        keeps_shards: whether finished shards stay in `out`.
        round_scales: as in `Settings`.
        is_finished: whether an earlier run finished all of it.
    """

    out: Path
    dtype: str
    layout: str
    config: GrokConfig
    tokenizer: Path | None
    shards: list[Shard]
    finished: frozenset[str]
    record: dict[str, Any]
    scratch_bytes: int = 0
    keeps_shards: bool = True
    round_scales: bool = False
    is_finished: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def finished_bytes(self) -> int:
        """Bytes of the shards that an earlier run finished."""
        return sum(shard.nbytes for shard in self.shards if shard.name in self.finished)

    @property
    def needed_bytes(self) -> int:
        """Free disk space that the rest of the conversion needs."""
        remaining = sorted((shard.nbytes for shard in self.shards if shard.name not in self.finished), reverse=True)
        # A discarded shard is deleted after its upload, when the next one is begun already.
        return sum(remaining if self.keeps_shards else remaining[:2]) + self.scratch_bytes + COMPANION_BYTES


def plan_conversion(
    checkpoint: Checkpoint,
    out: Path,
    settings: Settings,
    sink: Sink | None = None,
    *,
    check_place: bool = True,
    check_space: bool = True,
) -> Plan:
    """Plans a conversion and checks everything that it needs.

    Args:
        checkpoint: what is converted.
        out: a folder that does not exist, is empty, or holds an unfinished conversion of the same source and settings.
        settings: how.
        sink: what receives the shards; by default they stay in `out`.
        check_place: whether files that are in `out` already are a problem.
        check_space: whether too little disk space is one.

    Raises:
        CheckpointError, ConversionError: with all problems at once.
    """
    sink = sink or FolderSink()
    problems = settings.problems() + checkpoint.problems
    plan = None
    if not settings.problems():
        plan, file_problems = _planned(checkpoint, out, settings, sink)
        problems += file_problems
        if check_place:
            problems += output_problems(out, plan.record)
        if check_space:
            problems += space_problems(plan)
    if checkpoint.file_problems:
        raise CheckpointError(
            f"{checkpoint.name}: cannot be converted", checkpoint.file_problems + problems, checkpoint.next_step
        )
    if problems or plan is None:
        raise ConversionError(f"{checkpoint.name}: cannot be converted to {out}", problems)
    return plan


def _planned(checkpoint: Checkpoint, out: Path, settings: Settings, sink: Sink) -> tuple[Plan, list[str]]:
    """The plan, and problems with its group size and its order of files, one line per problem."""
    config, source = checkpoint.config, checkpoint.source
    entries = checkpoint_entries(config)
    released = {entry.index: entry.kind.scale_blocks for entry in entries if entry.kind.quantised}
    group_size = settings.inputs_per_scale
    problems = []
    if settings.dtype in BITS:
        problems += group_size_problems(entries, settings.dtype, group_size, released | source.scale_blocks())
    if settings.layout == "gguf" and not (problems or checkpoint.file_problems):
        problems += _gguf_problems(checkpoint, settings)
    shards = planned_shards(config, settings, checkpoint.tokenizer)
    written = written_config(config, settings.dtype, settings.layout, group_size)
    record = {
        "settings": {
            "dtype": settings.dtype,
            "layout": settings.layout,
            "max_shard_size": settings.max_shard_bytes,
            **_gguf_settings(settings, checkpoint.tokenizer),
            "config": json.loads(written.to_json_string(use_diff=False)),
            "tokenizer": None if checkpoint.tokenizer is None else sha256_of(checkpoint.tokenizer),
            "version": version("modeling-grok1"),
        },
        "source": source.identity(),
    }
    if not checkpoint.file_problems:
        problems += source.order_problems([source_files(shard) for shard in shards])
    ours = not problems and not output_problems(out, record)
    finished = frozenset(shard.name for shard in shards if ours and sink.has(shard, out))
    plan = Plan(
        *(out, settings.dtype, settings.layout, written, checkpoint.tokenizer, shards, finished, record),
        scratch_bytes=source.scratch_bytes,
        keeps_shards=sink.keeps_shards,
        round_scales=settings.round_scales,
    )
    return plan, problems


def planned_shards(config: GrokConfig, settings: Settings, tokenizer: Path | None) -> list[Shard]:
    """Every file of weights that a conversion with these settings writes."""
    tensors = hub_tensors(
        config, settings.layout, settings.dtype, settings.inputs_per_scale, settings.embedding
    ).values()
    if settings.layout == "gguf":
        groups = list(fill_shards(tensors, settings.max_shard_bytes))
        is_release, round_scales = has_release_sizes(config), settings.round_scales
        return gguf_shards(groups, config, tokenizer, is_release=is_release, round_scales=round_scales)
    return plan_shards(tensors, settings.max_shard_bytes)


def _gguf_problems(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """Why the numbers do not fit into blocks. Scales of int4 are found, and checked, when a matrix is quantised."""
    width = checkpoint.config.hidden_size
    problems = []
    if settings.embedding in BLOCK_BYTES and width % BLOCK_SIZE:
        problems.append(f"embedding: expected rows of a multiple of {BLOCK_SIZE} for q8_0, found {width}")
    if settings.dtype == "int8":
        problems += inexact_scale_problems(checkpoint.source.local_files().values(), settings.round_scales)
    return problems


def _gguf_settings(settings: Settings, tokenizer: Path | None) -> dict[str, Any]:
    """What the record of a conversion to GGUF has besides."""
    if settings.layout != "gguf":
        return {}
    template = None if tokenizer is None else tokenizer.with_name(TEMPLATE_NAME)
    return {
        "embedding": settings.embedding,
        "round_scales": settings.round_scales,
        "chat_template": sha256_of(template) if template is not None and template.is_file() else None,
    }


def source_files(shard: Shard) -> list[int]:
    """The indices of the files that a shard is made of, in the order in which it reads them."""
    return list(dict.fromkeys(part.entry.index for tensor in shard.tensors for part in tensor.parts))


def written_config(config: GrokConfig, dtype: str, layout: str, group_size: int) -> GrokConfig:
    """The config as the folder has it: the dtype that was written, and how packed weights are read."""
    written = copy.deepcopy(config)
    written.architectures = ["Grok1ForCausalLM"]
    written.dtype = "bfloat16" if dtype in BITS else dtype
    if dtype in BITS and layout != "gguf":
        written.quantization_config = quantization_dict(BITS[dtype], group_size)
    return written


def space_problems(plan: Plan) -> list[str]:
    """One line if the disk has too little space for the unfinished shards, else none."""
    free, needed = free_bytes(plan.out, plan.shards), plan.needed_bytes
    if free >= needed:
        return []
    return [f"{plan.out}: expected {needed:,} free bytes on the disk, found {free:,} ({needed - free:,} too few)"]


def free_bytes(out: Path, shards: Sequence[Shard] = ()) -> int:
    """Free bytes where `out` is or will be, counting half-written shards, which are written again."""
    place = out
    while not place.exists():
        place = place.absolute().parent
    partial = [place / f"{shard.name}{PARTIAL_SUFFIX}" for shard in shards] if place == out else []
    return shutil.disk_usage(place).free + sum(_allocated(path) for path in partial if path.is_file())


def _allocated(path: Path) -> int:
    status = path.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size
