"""The converter's own memory (RssAnon, as the kernel counts it) does not grow with the tensors or the shards."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grok1.conversion.layout import SLAB_BYTES
from grok1.conversion.names import checkpoint_entries
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from modeling_grok1 import GrokConfig


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")

# Says when the imports are done, so that the memory before the conversion is known.
CHILD = """
import sys
from grok1.conversion import streaming
from grok1.conversion.convert import convert
source, out, streaming.SLAB_BYTES = *sys.argv[1:3], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
convert(source, out, no_tokenizer=True, max_shard_size="1TB", jobs=2)
"""


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(text.split("RssAnon:")[1].split()[0]) * 1024 if "RssAnon:" in text else 0


def write_checkpoint(folder: Path, config: GrokConfig) -> None:
    (folder / "ckpt-0").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(-127, 128, 2**24, dtype=np.int8)

    def pieces(nbytes: int):
        while nbytes > 0:
            piece = noise.view(np.uint8)[:nbytes]
            nbytes -= len(piece)
            yield piece

    for entry in checkpoint_entries(config):
        scales = entry.scales_shape(entry.kind.scale_blocks) if entry.kind.quantised else None
        frame = tensor_frame(entry.shape, scales)
        bits = None if scales is None else np.full(scales, 0x3C00, np.uint16)
        weight = pieces(frame.weight_nbytes)
        write_tensor_file(folder / "ckpt-0" / entry.file, frame, weight, None if bits is None else lambda b=bits: b)
    config.to_json_file(folder / "config.json")


def growth(source: Path, out: Path, slab_bytes: int) -> tuple[int, int]:
    """Bytes of anonymous memory before the conversion, and the most during it."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(slab_bytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout.readline() == "ready\n"
    before = peak = anonymous(child.pid)
    stopped = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stopped.is_set():
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    child.communicate("\n")
    stopped.set()
    sampler.join()
    assert child.returncode == 0
    return before, peak


def test_a_large_checkpoint_in_one_shard(tmp_path):
    """Three files of 64 MiB of experts, an embedding of 200 MiB, one shard of 0.6 GB; slabs of 8 MiB."""
    config = GrokConfig(
        vocab_size=102400,
        hidden_size=512,
        intermediate_size=32768,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        num_experts=4,
    )
    write_checkpoint(tmp_path / "source", config)
    before, peak = growth(tmp_path / "source", tmp_path / "out", 8 * 2**20)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.stat().st_size > 550 * 10**6
    # Two slabs, the temporaries of two workers, what the allocator keeps, and the libraries that write the card.
    assert peak - before < 180 * 2**20


@pytest.mark.slow
def test_the_true_sizes_of_the_release(tmp_path):
    """One layer and the embedding of the release: at most 1 GiB in all, whatever the shard size."""
    config = GrokConfig(num_hidden_layers=1)
    write_checkpoint(tmp_path / "source", config)
    _, peak = growth(tmp_path / "source", tmp_path / "out", SLAB_BYTES)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.stat().st_size > 13 * 10**9
    assert peak <= 2**30
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 6144
