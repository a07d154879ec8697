"""Carries out a plan: shard after shard, in bounded memory, so that a run that was killed can be resumed.

A shard is written under a temporary name and gets its own when its bytes are on the disk and its source is unchanged.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from grok1.conversion.companions import write_companions
from grok1.conversion.journal import claimed
from grok1.conversion.names import HubTensor
from grok1.conversion.plan import Plan, source_files
from grok1.conversion.ports import Sink, Source
from grok1.conversion.shards import Shard
from grok1.conversion.streaming import BlockStream
from grok1.conversion.sums import record_sum
from grok1.conversion.xai.checkpoint import TensorFile, check_unchanged
from grok1.files import BINARY, PARTIAL_SUFFIX, FileState, Progress, sync_folder, unwritable, write_at


AGAIN = "Finished files are kept: run the same command again to continue."


def run(plan: Plan, source: Source, sink: Sink, jobs: int, progress: Progress | None = None) -> None:
    """Carries out a plan.

    Args:
        jobs: worker threads.
        progress: called with (bytes written, bytes in all) after each block, from any thread.

    Raises:
        CheckpointError: a source file changed or cannot be read any more.
        ConversionError: the output cannot be written, or another process is writing it.
        KeyboardInterrupt: passed on. After any of these, running the same plan again resumes.
    """
    try:
        with claimed(plan.out, plan.record):
            # Another run may have worked there between the plan and the lock.
            finished = frozenset(shard.name for shard in plan.shards if sink.has(shard, plan.out))
            plan = dataclasses.replace(plan, finished=finished)
            for shard in plan.shards:
                (plan.out / f"{shard.name}{PARTIAL_SUFFIX}").unlink(missing_ok=True)
                # An earlier run may have ended between writing, sending and removing it.
                if shard.name in finished and (plan.out / shard.name).is_file():
                    sink.shard_finished(plan.out / shard.name)
            with ShardWriter(plan, source, sink, jobs, progress) as writer:
                writer.write()
            write_companions(plan)
            sink.folder_finished(plan.out)
    except OSError as error:
        raise unwritable(plan.out, error, AGAIN) from error


class ShardWriter:
    """Writes the shards of a plan that are not finished: one at a time, its blocks on all workers.

    While the last bytes of a shard are synchronised to the disk, the next one is begun.
    """

    def __init__(self, plan: Plan, source: Source, sink: Sink, jobs: int, progress: Progress | None):
        self.plan, self.source, self.sink = plan, source, sink
        self.blocks = BlockStream(jobs, plan.round_scales)
        self.finisher = ThreadPoolExecutor(1, "grok1-finish")
        self.write_lock = threading.Lock()
        self.progress, self.progress_lock = progress, threading.Lock()
        self.done, self.total = plan.finished_bytes, plan.nbytes

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.blocks.close()
        self.finisher.shutdown()

    def write(self) -> None:
        remaining = [shard for shard in self.plan.shards if shard.name not in self.plan.finished]
        needed = [source_files(shard) for shard in remaining]
        self.source.schedule(list(dict.fromkeys(index for indices in needed for index in indices)))
        self.advance(0)
        finishing: Future[None] | None = None
        for position, shard in enumerate(remaining):
            later = {index for indices in needed[position + 1 :] for index in indices}
            path = self.plan.out / f"{shard.name}{PARTIAL_SUFFIX}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o644)
            try:
                os.ftruncate(descriptor, shard.nbytes)  # what no tensor fills is zero
                files = {index: self.source.open(index) for index in needed[position]}
                write_at(descriptor, memoryview(shard.header), 0)
                self.blocks.run(shard, files, partial(self.write_block, descriptor))
                if finishing is not None:
                    finishing.result()
            except BaseException:
                self.blocks.close()
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
            finishing = self.finisher.submit(self.finish, descriptor, shard, files, set(files) - later)
        if finishing is not None:
            finishing.result()

    def write_block(self, descriptor: int, _: HubTensor, position: int, data: memoryview) -> None:
        # The system writes to a file one call at a time; a thread that waits for this lock uses no CPU.
        with self.write_lock:
            write_at(descriptor, data, position)
        self.advance(len(data))

    def finish(self, descriptor: int, shard: Shard, files: dict[int, TensorFile], unneeded: set[int]) -> None:
        """Gives a shard its final name when its bytes are on the disk and its source files are unchanged."""
        path = self.plan.out / shard.name
        finish_file(descriptor, path, {file.path: file.state for file in files.values()})
        record_sum(path)
        self.sink.shard_finished(path)
        for index in sorted(unneeded):
            self.source.release(index)

    def advance(self, count: int) -> None:
        with self.progress_lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)


def finish_file(descriptor: int, path: Path, sources: Mapping[Path, FileState]) -> None:
    """Synchronises and closes `path`.partial and renames it to `path`, if its sources are unchanged; else removes it.

    Args:
        descriptor: of the partial file; closed in any case.
        sources: the files that it was made from, with their states before they were read.

    Raises:
        CheckpointError: a source changed.
        OSError: the file cannot be written.
    """
    unfinished = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
    try:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for file, state in sources.items():
            check_unchanged(file, state)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    sync_folder(path.parent)
