"""The Triton kernel computes the plain product of 8 and 4 bits: in Triton's interpreter, and compiled on a GPU."""

import importlib
import sys
from functools import partial

import pytest
import torch

from modeling_grok1.packing_grok1 import pack
from modeling_grok1.quantized_grok1 import dequantise


pytest.importorskip("triton", reason="needs Triton: pip install triton")

KERNEL = "modeling_grok1.triton_grok1"
# Rows of each expert, outputs, inputs, scale blocks: no rows, one row, more than a tile; widths that no tile divides.
CASES = [
    ([1, 0, 2, 0, 0, 1, 0, 0], 70, 128, 1),
    ([0, 17, 0, 40], 33, 352, 8),
    ([150, 0], 130, 48, 2),
    ([0, 0, 0], 16, 32, 1),
    ([5], 40, 600, 1),
]


def compare(matmul, counts, outputs, inputs, blocks, bits, dtype, device):
    generator = torch.Generator().manual_seed(0)
    experts, rows = len(counts), sum(counts)
    x = torch.randn(rows + 3, inputs, generator=generator).to(dtype)
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    weight = torch.randint(low, high, (experts, outputs, inputs), generator=generator, dtype=torch.int8)
    weight = weight if bits == 8 else pack(weight, 4)
    scale = (torch.rand(experts, outputs, blocks, generator=generator) * 0.01 + 0.001).bfloat16()
    offsets = torch.tensor(counts).cumsum(dim=0, dtype=torch.int32)
    y = matmul(x.to(device), weight.to(device), scale.to(device), offsets.to(device)).cpu()
    assert y.shape == (rows + 3, outputs)
    assert y.dtype == dtype
    assert (y[rows:] == 0).all()
    start = 0
    for e, count in enumerate(counts):
        matrix = dequantise(weight[e], scale[e], dtype).double()
        expected = x[start : start + count].double() @ matrix.T
        tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        if count:
            assert (y[start : start + count].double() - expected).norm() <= tolerance * expected.norm()
        start += count


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    yield importlib.import_module(KERNEL).quantised_grouped_matmul
    sys.modules.pop(KERNEL)  # the next import compiles


# The interpreter's own dot product is wrong for bfloat16, which numpy does not have.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CASES)
def test_interpreted(interpreted, case, bits, dtype):
    compare(interpreted, *case, bits, dtype, "cpu")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("split_k", [2, 3, 100])
def test_programs_that_share_the_inputs(interpreted, split_k, bits):
    """Parts of a sum, also where there are fewer steps than programs."""
    tile = sys.modules[KERNEL].Tile(16, 32, 64, split_k=split_k)
    for case in CASES:
        compare(partial(interpreted, tile=tile), *case, bits, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", [*CASES, ([1, 1], 65536, 6144, 1), ([1000, 48], 6144, 32768, 8)])
def test_compiled(case, bits, dtype):
    compare(importlib.import_module(KERNEL).quantised_grouped_matmul, *case, bits, dtype, "cuda")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", [(16, 32, 256), (64, 128, 64)])
def test_compiles_for_a_gpu_that_is_not_here(tile, bits):
    """Down to machine code for compute capability 9.0, with the released model's expert and blocks of 4096 inputs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = importlib.import_module(KERNEL).quantised_matmul_kernel
    pointers = {
        "x_ptr": "*bf16",
        "weight_ptr": "*i8" if bits == 8 else "*u8",
        "scale_ptr": "*bf16",
        "offsets_ptr": "*i32",
        "y_ptr": "*bf16",
    }
    constants = {
        "E": 8,
        "BITS": bits,
        "GROUP": 4096,
        "SPLIT_K": 4,
        **dict(zip(("BLOCK_S", "BLOCK_N", "BLOCK_K"), tile, strict=True)),
    }
    signature = {**pointers, "S": "i32", "N": "i32", "K": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "mma" in compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
