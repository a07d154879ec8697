"""The bytes that the kernel reads from the disk for one token, with everything dropped from the page cache before."""

import os
from pathlib import Path

import pytest
import torch
from small_grok import prompt, save_small_grok
from transformers import AutoModelForCausalLM


IO = Path("/proc/self/io")
SIZES = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 2048, "max_position_embeddings": 64}
EXPERT_BYTES = 3 * 512 * 2048 * 2


def bytes_from_disk() -> int:
    """`read_bytes`: what came from the device, page faults of memory maps included, unlike `rchar`."""
    return int(IO.read_text().split("read_bytes: ")[1].split()[0])


def drop_from_the_page_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@torch.no_grad()
def bytes_for_one_token(model, *folders: Path) -> int:
    for folder in folders:
        drop_from_the_page_cache(folder)
    before = bytes_from_disk()
    model(prompt(1))
    return bytes_from_disk() - before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not IO.exists():
        pytest.skip("needs /proc/self/io")
    folder = save_small_grok(tmp_path_factory.mktemp("kernel"), dtype=torch.bfloat16, **SIZES)
    drop_from_the_page_cache(folder)
    before = bytes_from_disk()
    size = len((folder / "model.safetensors").read_bytes())
    if bytes_from_disk() - before < size // 2:
        pytest.skip("this file system does not show its reads in /proc/self/io")
    return folder


def test_one_token_reads_a_quarter_of_what_whole_layers_take(folder, tmp_path):
    # One after the other: pages that are mapped into the process, as loading leaves them, cannot be dropped.
    routed = AutoModelForCausalLM.from_pretrained(folder, experts_on="disk")
    bytes_for_one_token(routed)  # maps the weights outside the experts, so that only experts are counted below
    few = bytes_for_one_token(routed, folder)

    layers = {f"model.layers.{layer}.block_sparse_moe.experts": "disk" for layer in range(2)}
    rest = {name.rpartition(".")[0]: "cpu" for name, _ in (*routed.named_parameters(), *routed.named_buffers())}
    whole_layers = AutoModelForCausalLM.from_pretrained(
        folder, device_map={**rest, "lm_head": "cpu", **layers}, offload_folder=tmp_path
    )
    bytes_for_one_token(whole_layers)
    everything = bytes_for_one_token(whole_layers, tmp_path)

    print(f"one token: {few / 1e6:.1f} MB routed, {everything / 1e6:.1f} MB whole layers")
    # A quarter: nothing is read ahead. Pages at the edges lie in memory or are read for two.
    assert few == pytest.approx(2 * 2 * EXPERT_BYTES, rel=0.01)
    assert everything >= 0.9 * 2 * 8 * EXPERT_BYTES
