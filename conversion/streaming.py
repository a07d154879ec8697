"""Every byte of a shard, derived from the source block by block, on all cores and in bounded memory.

One thread reads slabs of the source files, the workers dequantise and transpose blocks of them. The converter writes
the blocks, the verification compares them.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import numpy as np
import torch

from grok1.conversion.layout import (
    BLOCK_ELEMENTS,
    SLAB_BYTES,
    Scratch,
    Slab,
    as_bytes,
    read_slab,
    slab_ranges,
)
from grok1.conversion.names import HubTensor
from grok1.conversion.packing import Packer
from grok1.conversion.shards import Shard
from grok1.conversion.xai.checkpoint import TensorFile
from grok1.files import BLOCK_BYTES, array_bytes


# Slabs in memory: one is processed while the next one is read.
LIVE_SLABS = 2
# Temporaries of all workers together. An element of a block needs 8 bytes: in float32 the product and its transposed
# copy, in bfloat16 the product, the rounded product and its transposed copy.
WORK_BYTES = 128 * 2**20
BYTES_PER_ELEMENT = 8

# Called from any worker with a tensor of the shard, a position in the file, and the bytes that belong there. They are
# valid until it returns.
Consumer = Callable[[HubTensor, int, memoryview], None]


class BlockStream:
    """Worker threads and their memory. A context manager: leaving it waits for running blocks.

    Args:
        jobs: worker threads.
        round_scales: whether a scale that the format cannot hold is rounded (see `blocks`).
    """

    def __init__(self, jobs: int, round_scales: bool = False):
        self.slab_bytes = SLAB_BYTES
        self.block_elements = min(BLOCK_ELEMENTS, max(1, WORK_BYTES // BYTES_PER_ELEMENT // jobs))
        self.threads_before = torch.get_num_threads()
        # The workers are the parallelism: torch must not start threads inside each operator.
        torch.set_num_threads(1)
        self.workers = ThreadPoolExecutor(jobs, "grok1-blocks")
        self.live: deque[list[Future[None]]] = deque()
        self.of_thread = threading.local()
        self.packer = Packer(round_scales)
        # Pages that are never touched take no memory.
        self.buffers = deque(np.empty(self.slab_bytes, np.uint8) for _ in range(LIVE_SLABS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels blocks that have not begun and waits for the others."""
        self.workers.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads_before)

    def run(self, shard: Shard, files: Mapping[int, TensorFile], consume: Consumer) -> None:
        """Derives all tensors of a shard and hands every block to `consume`, in no order.

        Args:
            shard: what to derive.
            files: the source files that its parts come from, by index.
            consume: sees each byte after the header once; what it raises is raised here.
        """
        for tensor in shard.tensors:
            for part in tensor.parts:
                file = files[part.entry.index]
                if self.packer.constant(tensor, part, partial(consume, tensor, shard.offsets[tensor.name])):
                    continue
                part = self.packer.source(tensor, part)
                base = shard.offsets[tensor.name] + array_bytes(tensor.dtype, part.offset)
                for start, stop in slab_ranges(file, part, self.slab_bytes):
                    slab = read_slab(file, part, start, stop, self._next_buffer())
                    self.live.append(
                        [
                            self.workers.submit(self._derive, consume, tensor, slab, first, last, base)
                            for first, last in slab.blocks(self.block_elements)
                        ]
                    )
        while self.live:
            _wait_for(self.live.popleft())

    def _next_buffer(self) -> np.ndarray:
        """Memory for a slab that no worker uses any more: allocating new memory is slower than reading the file."""
        while len(self.live) >= LIVE_SLABS:
            _wait_for(self.live.popleft())
        self.buffers.rotate()
        return self.buffers[0]

    def _derive(self, consume: Consumer, tensor: HubTensor, slab: Slab, first: int, last: int, base: int) -> None:
        if not hasattr(self.of_thread, "scratch"):
            self.of_thread.scratch = Scratch()
        if tensor.packing is None and tensor.dtype not in BLOCK_BYTES:
            rows = as_bytes(slab.rows(first, last, tensor.dtype, self.of_thread.scratch))
        else:
            rows = as_bytes(self.packer.rows(tensor, slab, first, last, self.of_thread.scratch))
        consume(tensor, base + first * (len(rows) // (last - first)), rows)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait_for(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()
