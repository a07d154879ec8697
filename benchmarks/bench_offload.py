"""Read bandwidth of a disk for experts, and the tokens/s of the released model that follow from it.

    python benchmarks/bench_offload.py --folder /a/folder/on/the/disk

Writes a few experts of the released size into the folder (bfloat16, then int8), drops them from the page cache, reads
them as `experts_on="disk"` does, the two experts of a layer at a time, and deletes them. Prints a table in Markdown.
Without a GPU the copy to it is skipped.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from modeling_grok1 import GrokConfig
from modeling_grok1.offloading_grok1 import DISK, ExpertStore, find_experts


GB = 10**9
ELSEWHERE = {"one NVMe disk at 7 GB/s": 7, "four of them, striped": 28, "host memory over PCIe 5 x16": 50}


def write_experts(path: Path, config: GrokConfig, int8: bool) -> None:
    """A safetensors file with one layer of experts, random bytes, without holding it in memory."""
    D, F = config.hidden_size, config.intermediate_size  # noqa: N806
    header, end = {}, 0
    for expert in range(config.num_experts):
        for matrix, shape, blocks in (("w1", (F, D), 1), ("w2", (D, F), 8), ("w3", (F, D), 1)):
            tensors = {"weight": (shape, "I8" if int8 else "BF16", 1 if int8 else 2)}
            if int8:
                tensors["weight_scale"] = ((shape[0], blocks), "BF16", 2)
            for part, (size, dtype, width) in tensors.items():
                start, end = end, end + size[0] * size[1] * width
                name = f"model.layers.0.block_sparse_moe.experts.{expert}.{matrix}.{part}"
                header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    noise = os.urandom(2**24)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(noise)):
            stream.write(noise[: end - start])
        stream.flush()
        os.fsync(stream.fileno())


def read_rate(path: Path, config: GrokConfig, int8: bool, repeats: int) -> tuple[float, int]:
    """Bytes per second from the disk, the fastest of `repeats` passes over the file, and the bytes of one expert."""
    experts = find_experts(config, [str(path)], lambda name: name, blocks=8 if int8 else None)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "meta")
    store = ExpertStore(experts, DISK, read_ahead=config.num_experts_per_tok)
    best = 0.0
    for _ in range(repeats):
        with open(path, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before, start = store.bytes_fetched, time.perf_counter()
        for first in range(0, config.num_experts, config.num_experts_per_tok):
            chosen = range(first, first + config.num_experts_per_tok)
            for _ in store.fetch(0, chosen, device, torch.bfloat16):
                pass
        best = max(best, (store.bytes_fetched - before) / (time.perf_counter() - start))
    return best, sum(stored.nbytes for stored in experts[0, 0].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the disk")
    parser.add_argument("--experts", type=int, default=4, help="experts to write, 1.2 GB each in bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    released = GrokConfig()
    config = GrokConfig(num_hidden_layers=1, num_experts=args.experts)
    chosen = released.num_hidden_layers * released.num_experts_per_tok
    print("| precision | where the experts are | GB/s | GB a token | tokens/s | GB a token, whole layers | tokens/s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for precision, int8 in (("bfloat16", False), ("int8", True)):
        with tempfile.NamedTemporaryFile(dir=args.folder, suffix=".safetensors") as scratch:
            write_experts(Path(scratch.name), config, int8)
            rate, expert = read_rate(Path(scratch.name), config, int8, args.repeats)
        token = chosen * expert
        whole = token * released.num_experts // released.num_experts_per_tok
        for place, speed in {f"{args.folder} (measured)": rate / GB, **ELSEWHERE}.items():
            print(
                f"| {precision} | {place} | {speed:.2f} | {token / GB:.1f} | {speed * GB / token:.4f} | "
                f"{whole / GB:.1f} | {speed * GB / whole:.4f} |"
            )


if __name__ == "__main__":
    main()
