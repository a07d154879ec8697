"""xAI's checkpoint to a folder for the hub: bounded memory, restartable, reproducible byte for byte.

find      the checkpoint, in a folder or on the hub (inputs, from_hub)
plan      what will be written, every problem at once; nothing is touched (plan)
write     shard after shard; then config, code, tokenizer, card, and the index last (write, companions)
push      optionally, each finished file to a repository on the hub (to_hub)
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

from grok1.conversion.finished import finished, is_finished, read_source, small_files
from grok1.conversion.from_hub import SCHEME, find_on_hub
from grok1.conversion.inputs import Checkpoint, find_folder
from grok1.conversion.plan import Plan, plan_conversion
from grok1.conversion.ports import FolderSink, Sink
from grok1.conversion.settings import Settings
from grok1.conversion.streaming import available_cores
from grok1.conversion.to_hub import HubSink
from grok1.conversion.write import run
from grok1.errors import ConversionError
from grok1.files import Progress


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Plan:
    """Converts xAI's checkpoint to a folder that Transformers loads and the hub accepts.

    Run again with the same arguments after an interruption, it resumes with the first shard that is not finished. Run
    again after it finished, it returns at once, with `is_finished` in the plan.

    Args:
        source: the folder with the tensor files, or the one above its ckpt-0/ or ckpt/; or hf://owner/name[@revision].
        out: a folder that does not exist, is empty, or holds an unfinished conversion of the same source and settings.
        settings: see `Settings`; the defaults write bfloat16 in the hub layout.
        jobs: worker threads; by default one per core.
        progress: called with (bytes written, bytes in all) after each block, from any thread.
        changes: fields of `Settings`, in place of those of `settings`: `convert(source, out, dtype="int8")`.

    Returns:
        The plan that was carried out.

    Raises:
        CheckpointError: the source is not a complete checkpoint of these sizes; it lists every problem.
        ConversionError: anything else that was refused, with all problems; or the run could not be finished, in which
            case finished shards stay and the same call resumes.
    """
    settings = dataclasses.replace(settings or Settings(), **changes)
    out = Path(out)
    sink: Sink = FolderSink()
    if settings.push_to is not None:
        if settings.problems():
            raise ConversionError(f"{source}: cannot be converted to {out}", settings.problems())
        sink = HubSink(settings.push_to, out, settings.private, settings.discard_output)
    find = find_on_hub if os.fspath(source).startswith(SCHEME) else find_folder
    checkpoint = find(os.fspath(source), out, settings)
    done = False
    try:
        if is_finished(out):
            plan = _finished(checkpoint, out, settings, sink)
        else:
            plan = plan_conversion(checkpoint, out, settings, sink)
            run(plan, checkpoint.source, sink, jobs or available_cores(), progress)
        done = True
    finally:
        checkpoint.source.close(done)
    return plan


def _finished(checkpoint: Checkpoint, out: Path, settings: Settings, sink: Sink) -> Plan:
    """The plan of the finished conversion in `out`; sends what the sink does not have yet."""
    plan = plan_conversion(checkpoint, out, settings, sink, check_place=False, check_space=False)
    source = checkpoint.source
    source.schedule(small_files(plan))
    plan = finished(plan, sink, source.changed_since, partial(read_source, source))
    sink.folder_finished(out)
    return plan
