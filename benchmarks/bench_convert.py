"""Speed and memory of the converter on one layer of the release's true shapes, beside `cp` of the same output bytes.

    python benchmarks/bench_convert.py [--dtype bfloat16] [--jobs N] [--folder DIR] [--repeat N]

Writes about 5 GB of synthetic int8 checkpoint, converts it in a process of its own, copies the result with cp, and
removes everything. Prints one line of JSON for each repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grok1.conversion.names import Entry, checkpoint_entries
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from modeling_grok1.configuration_grok1 import GrokConfig


PIECE_BYTES = 64 * 2**20
# The time of the imports is no part of it: it is the same for a conversion that takes hours.
CONVERT = """
import os, sys, time
from grok1.conversion.convert import convert
source, out, dtype, layout, jobs = sys.argv[1:]
wall, cpu = time.perf_counter(), time.process_time()
convert(source, out, dtype=dtype, layout=layout, jobs=int(jobs) or None, no_tokenizer=True)
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def write_synthetic(folder: Path, config: GrokConfig, entries: list[Entry]) -> int:
    """Writes random files of these shapes in xAI's format; returns their bytes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    noise = random.integers(-127, 128, PIECE_BYTES, dtype=np.int8)
    floats = random.standard_normal(PIECE_BYTES // 4, dtype=np.float32)
    total = 0
    for entry in entries:
        scales_shape = entry.scales_shape(entry.kind.scale_blocks) if entry.kind.quantised else None
        frame = tensor_frame(entry.shape, scales_shape)
        # Numbers between 1 and 2 in bfloat16, times 2**-10: any 7 bits of mantissa.
        scales = None if scales_shape is None else random.integers(0x3A80, 0x3B00, scales_shape, dtype=np.uint16)
        pieces = _pieces(noise if entry.kind.quantised else floats, frame.weight_nbytes)
        write_tensor_file(folder / entry.file, frame, pieces, None if scales is None else lambda bits=scales: bits)
        total += frame.size
    config.to_json_file(folder.parent / "config.json")
    return total


def _pieces(data: np.ndarray, nbytes: int) -> Iterator[np.ndarray]:
    """`nbytes` of data, which is repeated from another place each time so that no two rows are equal."""
    raw = data.view(np.uint8)
    shift = 0
    while nbytes > 0:
        count = min(nbytes, len(raw) - shift)
        yield raw[shift : shift + count]
        nbytes -= count
        shift = (shift + 4 * 99991) % (len(raw) // 2)


class Sampler(threading.Thread):
    """The greatest RssAnon of a process, in bytes, looked at every 20 ms."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status, self.peak = Path(f"/proc/{pid}/status"), 0

    def run(self) -> None:
        while True:
            try:
                text = self.status.read_text()
            except OSError:
                return
            if "RssAnon:" not in text:
                return
            self.peak = max(self.peak, int(text.split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.02)


def convert_once(source: Path, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Converts to `out`: seconds of the clock and of the processors, peak of RssAnon in bytes."""
    command = [sys.executable, "-c", CONVERT, source, out, arguments.dtype, arguments.layout, arguments.jobs]
    os.sync()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    sampler = Sampler(process.pid)
    sampler.start()
    printed, _ = process.communicate()
    sampler.join()
    if process.returncode != 0:
        raise SystemExit("the conversion failed")
    seconds, cpu = (float(number) for number in printed.split())
    return {"seconds": seconds, "cpu": cpu, "peak": sampler.peak}


def copy_once(out: Path, copy: Path) -> dict[str, float]:
    """Copies `out` with cp and removes the copy: seconds of the clock and of the processors."""
    os.sync()
    begin, cpu = time.perf_counter(), _children_cpu()
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    measured = {"seconds": time.perf_counter() - begin, "cpu": _children_cpu() - cpu}
    shutil.rmtree(copy)
    return measured


def measure(source: Path, out: Path, copy: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One comparison. As many bytes are deleted before each of the two: both find the page cache in the same state."""
    copied = copy_once(out, copy)
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    converted = convert_once(source, out, arguments)
    return {
        "dtype": arguments.dtype,
        "layout": arguments.layout,
        "output_bytes": nbytes,
        "convert_seconds": round(converted["seconds"], 1),
        "convert_cpu_seconds": round(converted["cpu"], 1),
        "cp_seconds": round(copied["seconds"], 1),
        "cp_cpu_seconds": round(copied["cpu"], 1),
        "convert_MB_per_s": round(nbytes / 1e6 / converted["seconds"]),
        "cp_MB_per_s": round(nbytes / 1e6 / copied["seconds"]),
        "rate_over_cp": round(copied["seconds"] / converted["seconds"], 2),
        "peak_RssAnon_MiB": round(converted["peak"] / 2**20),
    }


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--layout", default="hub", choices=["hub", "fused", "hpcai", "keyfan"])
    parser.add_argument("--jobs", type=int, default=0, help="worker threads; 0: one a core")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk to test"
    )
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--vocab-size", type=int, default=8192, help="131072 for the true embedding")
    arguments = parser.parse_args()

    config = GrokConfig(num_hidden_layers=1, vocab_size=arguments.vocab_size)
    itemsize = {"bfloat16": 2, "float32": 4, "int8": 1}[arguments.dtype]
    entries = checkpoint_entries(config)
    numel = sum(int(np.prod(entry.shape)) for entry in entries)
    needed = numel * (1 + 2 * itemsize) + 2**30
    free = shutil.disk_usage(arguments.folder).free
    if free < needed:
        raise SystemExit(f"{arguments.folder}: needs {needed / 1e9:.0f} GB free, found {free / 1e9:.0f} GB")
    with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=arguments.folder) as name:
        work = Path(name)
        total = write_synthetic(work / "ckpt-0", config, entries)
        print(f"synthetic checkpoint: {total / 1e9:.2f} GB", file=sys.stderr)
        convert_once(work / "ckpt-0", work / "out", arguments)
        copy_once(work / "out", work / "copy")
        for _ in range(arguments.repeat):
            print(json.dumps(measure(work / "ckpt-0", work / "out", work / "copy", arguments)), flush=True)


if __name__ == "__main__":
    main()
