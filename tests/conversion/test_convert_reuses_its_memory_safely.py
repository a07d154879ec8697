"""Slabs and temporaries are used again, by several threads, and never while a block of them is still unwritten."""

import random
import threading
import time

import pytest

from grok1.conversion import streaming
from grok1.conversion.convert import convert
from grok1.conversion.write import ShardWriter


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


BLOCKS = [(1 << 13, 1 << 10), (1 << 15, 1 << 8)]
# Quantising to int4 searches for the scales of each block, so few blocks of it.
CASES = [(dtype, *blocks) for dtype in ("bfloat16", "float32", "int8") for blocks in BLOCKS] + [
    ("int4", 1 << 14, 1 << 12)
]


@pytest.mark.parametrize(("dtype", "slab_bytes", "block_elements"), CASES)
def test_slow_writers_see_the_right_bytes(golden, converted, tmp_path, monkeypatch, dtype, slab_bytes, block_elements):
    monkeypatch.setattr(streaming, "SLAB_BYTES", slab_bytes)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS", block_elements)
    write_block, delays, seen = ShardWriter.write_block, random.Random(0), set()

    def late(self, descriptor, tensor, position, data):
        seen.add(threading.get_ident())
        if delays.random() < 0.05:
            time.sleep(0.002)  # the other workers and the reader continue
        write_block(self, descriptor, tensor, position, data)

    monkeypatch.setattr(ShardWriter, "write_block", late)
    group_size = {"int8": 2, "int4": 16}.get(dtype)
    convert(golden / "tiny-8", tmp_path / "out", dtype=dtype, group_size=group_size, no_tokenizer=True, jobs=4)
    assert len(seen) in (4, 5)  # the reader writes the shapes of packed weights
    monkeypatch.undo()
    assert folder_bytes(tmp_path / "out") == folder_bytes(converted("tiny-8", dtype))
