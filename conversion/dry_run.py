"""What a conversion would write and take, from the table of names and a second of measurement."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.convert import (
    Plan,
    free_bytes,
    plan_folder,
    read_config,
    setting_problems,
    write_at,
    written_config,
)
from grok1.conversion.layout import SLAB_BYTES
from grok1.conversion.names import BITS, checkpoint_entries, hub_tensors
from grok1.conversion.packing import group_size_problems
from grok1.conversion.shards import make_shard, parse_size, plan_shards
from grok1.conversion.streaming import BYTES_PER_ELEMENT, LIVE_SLABS, BlockStream, available_cores
from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from grok1.errors import ConversionError
from modeling_grok1.configuration_grok1 import GrokConfig
from modeling_grok1.packing_grok1 import GROUP_SIZES


# Anonymous memory of Python with torch and Transformers imported.
BASE_BYTES = 350 * 2**20


@dataclass(frozen=True)
class Forecast:
    """What a conversion comes to.

    Args:
        source: what was looked at: a folder, or the release's table.
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
        return asdict(self)


def forecast(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "bfloat16",
    layout: str = "hub",
    config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    no_tokenizer: bool = False,
    max_shard_size: int | str = "5GB",
    group_size: int | None = None,
    jobs: int | None = None,
) -> Forecast:
    """Plans `convert` with the same arguments and writes nothing but a temporary file beside `out`.

    Where `src` is no folder, the plan is made from the table alone: of the release, or of the sizes in `config`.

    Raises:
        CheckpointError, ConversionError: the source or the settings, with all problems. Too little disk is none here.
    """
    src, out = Path(src), Path(out)
    if src.is_dir():
        plan, _ = plan_folder(
            src,
            out,
            dtype=dtype,
            layout=layout,
            config=config,
            tokenizer=tokenizer,
            no_tokenizer=no_tokenizer,
            max_shard_size=max_shard_size,
            group_size=group_size,
            check_space=False,
        )
        source = str(src)
    else:
        problems = setting_problems(dtype, layout, max_shard_size, group_size)
        if problems:
            raise ConversionError("cannot be converted", problems)
        grok_config = GrokConfig() if config is None else read_config(Path(config))
        group_size = group_size or GROUP_SIZES[0]
        entries = checkpoint_entries(grok_config)
        blocks = {entry.index: entry.kind.scale_blocks for entry in entries}
        problems = group_size_problems(entries, dtype, group_size, blocks) if dtype in BITS else []
        if problems:
            raise ConversionError("cannot be converted", problems)
        shards = plan_shards(hub_tensors(grok_config, layout, dtype, group_size).values(), parse_size(max_shard_size))
        written = written_config(grok_config, dtype, group_size)
        plan = Plan(out, dtype, layout, parse_size(max_shard_size), written, None, shards, frozenset(), {})
        source = "the table of the release" if config is None else f"the sizes in {config}"
    jobs = jobs or available_cores()
    rate = measured_rate(out, dtype, jobs)
    return Forecast(
        source=source,
        shards={shard.name: shard.nbytes for shard in plan.shards},
        nbytes=plan.nbytes,
        needed_bytes=plan.needed_bytes,
        free_bytes=free_bytes(out, plan.shards),
        peak_bytes=peak_bytes(plan, jobs),
        bytes_per_second=rate,
        seconds=None if rate is None else (plan.nbytes - plan.finished_bytes) / rate,
    )


def peak_bytes(plan: Plan, jobs: int) -> int:
    """A bound on the anonymous memory of a conversion."""
    matrices = [entry for entry in checkpoint_entries(plan.config) if len(entry.shape) > 1]
    largest = max(int(np.prod(e.shape[-2:])) * (1 if e.kind.quantised else 4) for e in matrices)
    with BlockStream(jobs) as stream:
        work = jobs * stream.block_elements * BYTES_PER_ELEMENT
    return BASE_BYTES + LIVE_SLABS * min(largest, SLAB_BYTES) + work


def measured_rate(out: Path, dtype: str, jobs: int) -> float | None:
    """Bytes of output a second, on the disk of `out`: one matrix (8192, 6144) converted, written and synchronised."""
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
