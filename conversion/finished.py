"""Whether a folder holds the finished conversion that is asked for, so that the same command can be run again."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from grok1.conversion.companions import companion_files
from grok1.conversion.journal import JOURNAL_NAME
from grok1.conversion.layout import as_bytes, part_shape, read_slab
from grok1.conversion.names import HubTensor
from grok1.conversion.plan import Plan, source_files
from grok1.conversion.ports import Sink, Source
from grok1.conversion.shards import Shard
from grok1.errors import ConversionError
from grok1.files import INDEX_NAME, SUMS_NAME
from grok1.gguf_files import is_gguf
from grok1.model_card.card import CARD_NAME


SMALL_KINDS = ("norm", "router")
NEXT_STEP = "Choose an empty folder. `grok1 verify OUT --against CKPT` compares a finished conversion with its source."


def is_finished(out: Path) -> bool:
    """Whether the folder holds a finished conversion, of any source and settings."""
    holds_weights = (out / INDEX_NAME).is_file() or is_gguf(out)
    return not (out / JOURNAL_NAME).exists() and holds_weights and (out / SUMS_NAME).is_file()


def finished(
    plan: Plan, sink: Sink, changed_since: Callable[[int], list[str]], read: Callable[[Shard, HubTensor], bytes]
) -> Plan:
    """The plan of a conversion that was finished by an earlier run.

    Compared are sizes and headers of all shards, all small files but the card, the values of norms and routers, and
    the time of the sums with those of the source. The values of the matrices are not.

    Args:
        plan: of the conversion that is asked for; its folder `is_finished`.
        sink: what received the shards.
        changed_since: what of the source changed after a moment.
        read: the bytes of a tensor of a shard, as the source gives them.

    Raises:
        ConversionError: the folder holds another conversion; with what differs.
    """
    problems = changed_since((plan.out / SUMS_NAME).stat().st_mtime_ns)
    for shard in plan.shards:
        if not sink.has(shard, plan.out):
            found = "a different file" if (plan.out / shard.name).exists() else "no such file"
            problems.append(f"{shard.name}: expected a shard of {shard.nbytes:,} bytes, found {found}")
    problems += _companion_problems(plan)
    problems += [] if problems else _value_problems(plan, read)
    if problems:
        raise ConversionError(
            f"{plan.out}: expected an empty folder or none, found another finished conversion", problems, NEXT_STEP
        )
    return dataclasses.replace(plan, finished=frozenset(shard.name for shard in plan.shards), is_finished=True)


def read_source(source: Source, shard: Shard, tensor: HubTensor) -> bytes:
    """The bytes of a tensor that is one part of a source file."""
    (part,) = tensor.parts
    file = source.open(part.entry.index)
    slab = read_slab(file, part, 0, part_shape(file, part)[0])
    return bytes(as_bytes(slab.rows(slab.start, slab.stop, tensor.dtype)))


def small_files(plan: Plan) -> list[int]:
    """The indices of the source files whose values are compared."""
    small = {tensor.parts[0].entry.index for _, tensor in _small_tensors(plan)}
    return [index for shard in plan.shards for index in source_files(shard) if index in small]


def _small_tensors(plan: Plan) -> Iterator[tuple[Shard, HubTensor]]:
    for shard in plan.shards:
        for tensor in shard.tensors:
            if tensor.parts[0].entry.kind.name.startswith(SMALL_KINDS) and (plan.out / shard.name).is_file():
                yield shard, tensor


def _companion_problems(plan: Plan) -> list[str]:
    problems = []
    with tempfile.TemporaryDirectory(prefix="grok1-finished-") as name:
        for file in companion_files(Path(name), plan):
            path = plan.out / file
            if file != CARD_NAME and (not path.is_file() or path.read_bytes() != (Path(name) / file).read_bytes()):
                problems.append(f"{file}: not as this command would write it")
    return problems


def _value_problems(plan: Plan, read: Callable[[Shard, HubTensor], bytes]) -> list[str]:
    problems = []
    for shard, tensor in _small_tensors(plan):
        with (plan.out / shard.name).open("rb") as file:
            file.seek(shard.offsets[tensor.name])
            if file.read(tensor.nbytes) != read(shard, tensor):
                problems.append(f"{tensor.name}: not the values of this source")
    return problems
