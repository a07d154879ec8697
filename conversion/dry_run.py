"""What a conversion would write and need, from the table of names and a second of measurement."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.inputs import find_folder, read_config
from grok1.conversion.layout import SLAB_BYTES
from grok1.conversion.names import BITS, checkpoint_entries, hub_tensors
from grok1.conversion.packing import group_size_problems
from grok1.conversion.plan import Plan, free_bytes, plan_conversion, planned_shards, written_config
from grok1.conversion.settings import Settings
from grok1.conversion.shards import make_shard
from grok1.conversion.streaming import BYTES_PER_ELEMENT, LIVE_SLABS, BlockStream, available_cores
from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from grok1.errors import ConversionError
from grok1.files import write_at
from modeling_grok1.configuration_grok1 import GrokConfig


# Anonymous memory of Python with torch and Transformers imported.
BASE_BYTES = 350 * 2**20


@dataclass(frozen=True)
class Forecast:
    """Size, memory and time of a conversion.

    Args:
        source: what the plan was made from: a folder, or the release's table.
        shards: bytes of each shard by its name, headers included.
        nbytes: bytes of all shards.
        needed_bytes, free_bytes: of disk, for what is not finished yet.
        peak_bytes: bound on anonymous memory.
        bytes_per_second: measured here, of output on the disk; None if nothing can be written there.
        seconds: for what is not finished yet.
    """

    source: str
    shards: dict[str, int]
    nbytes: int
    needed_bytes: int
    free_bytes: int
    peak_bytes: int
    bytes_per_second: float | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def forecast(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    jobs: int | None = None,
    **changes: Any,
) -> Forecast:
    """Plans `convert` with the same arguments and writes nothing but a temporary file beside `out`.

    Where `source` is not a folder, the plan is made from the table alone: of the release, or of the sizes in `config`.

    Raises:
        CheckpointError, ConversionError: the source or the settings, with all problems. Too little disk is no error.
    """
    settings = dataclasses.replace(settings or Settings(), **changes)
    source, out = Path(source), Path(out)
    if source.is_dir():
        plan = plan_conversion(find_folder(source, out, settings), out, settings, check_space=False)
        name = str(source)
    else:
        plan = _plan_from_table(out, settings)
        name = "the table of the release" if settings.config is None else f"the sizes in {settings.config}"
    jobs = jobs or available_cores()
    rate = measured_rate(out, settings.dtype, jobs)
    return Forecast(
        source=name,
        shards={shard.name: shard.nbytes for shard in plan.shards},
        nbytes=plan.nbytes,
        needed_bytes=plan.needed_bytes,
        free_bytes=free_bytes(out, plan.shards),
        peak_bytes=peak_bytes(plan, jobs),
        bytes_per_second=rate,
        seconds=None if rate is None else (plan.nbytes - plan.finished_bytes) / rate,
    )


def _plan_from_table(out: Path, settings: Settings) -> Plan:
    if settings.problems():
        raise ConversionError("cannot be converted", settings.problems())
    config = GrokConfig() if settings.config is None else read_config(Path(settings.config))
    group_size = settings.inputs_per_scale
    if settings.dtype in BITS:
        entries = checkpoint_entries(config)
        blocks = {entry.index: entry.kind.scale_blocks for entry in entries}
        problems = group_size_problems(entries, settings.dtype, group_size, blocks)
        if problems:
            raise ConversionError("cannot be converted", problems)
    shards = planned_shards(config, settings, None)
    written = written_config(config, settings.dtype, settings.layout, group_size)
    return Plan(out, settings.dtype, settings.layout, written, None, shards, frozenset(), {})


def peak_bytes(plan: Plan, jobs: int) -> int:
    """A bound on the anonymous memory of a conversion."""
    matrices = [entry for entry in checkpoint_entries(plan.config) if len(entry.shape) > 1]
    largest = max(int(np.prod(e.shape[-2:])) * (1 if e.kind.quantised else 4) for e in matrices)
    with BlockStream(jobs) as stream:
        work = jobs * stream.block_elements * BYTES_PER_ELEMENT
    return BASE_BYTES + LIVE_SLABS * min(largest, SLAB_BYTES) + work


def measured_rate(out: Path, dtype: str, jobs: int) -> float | None:
    """Bytes of output per second on the disk of `out`: one matrix (8192, 6144) is converted and written to it."""
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    config = GrokConfig(num_hidden_layers=1, num_experts=1, num_experts_per_tok=1, intermediate_size=8192)
    entry = checkpoint_entries(config)[2]
    tensors = [tensor for tensor in hub_tensors(config, "hub", dtype).values() if tensor.parts[0].entry == entry]
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, entry.shape, dtype=np.int8)
    scales = random.integers(0x3A80, 0x3B00, entry.scales_shape(1), dtype=np.uint16)
    try:
        with tempfile.TemporaryDirectory(prefix=".grok1-dry-run-", dir=place) as name, BlockStream(jobs) as stream:
            source = Path(name) / entry.file
            write_tensor_file(source, tensor_frame(entry.shape, scales.shape), [weight], lambda: scales)
            shard = make_shard("sample", tensors)
            with (Path(name) / shard.name).open("wb") as file:
                begin = time.perf_counter()
                stream.run(
                    shard,
                    {entry.index: read_tensor_file(source)},
                    lambda _, position, data: write_at(file.fileno(), data, position),
                )
                os.fsync(file.fileno())
                return shard.nbytes / (time.perf_counter() - begin)
    except OSError:
        return None
