"""Which product each processor takes, that every product is the plain one, and that each level gives xAI's numbers."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from modeling_grok1 import Grok1ForCausalLM, cpu_grok1, kernels_grok1, quantized_grok1
from modeling_grok1.cpu_grok1 import Level, linear, products
from modeling_grok1.kernels_grok1 import (
    can_multiply_rows,
    can_multiply_tiles,
    floats,
    kernels,
    rows_matmul,
    tiled_matmul,
)
from modeling_grok1.packing_grok1 import pack
from modeling_grok1.quantized_grok1 import dequantise


BF16, FP32, INT8, INT4 = torch.bfloat16, torch.float32, torch.int8, torch.int32
needs_kernels = pytest.mark.skipif(kernels() is None, reason="needs a C compiler and a processor with AVX2")
# What `level` may find: with bfloat16 instructions and without, with a compiler and without.
LEVELS = {
    "avx512_bf16": Level(bfloat16=True, kernels=True),
    "avx2": Level(bfloat16=False, kernels=True),
    "avx2, no compiler": Level(bfloat16=False, kernels=False),
    "avx512_bf16, no compiler": Level(bfloat16=True, kernels=False),
}


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch):
    """This machine as if it had that level."""
    if LEVELS[request.param].kernels and kernels() is None:
        pytest.skip("needs a C compiler and a processor with AVX2")
    for module in (cpu_grok1, quantized_grok1):
        monkeypatch.setattr(module, "level", lambda: LEVELS[request.param])
    torch._dynamo.reset()
    return LEVELS[request.param]


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------
ROWS, TILES, FLOATS, PLAIN = cpu_grok1.ROWS, cpu_grok1.TILES, cpu_grok1.FLOATS, cpu_grok1.PLAIN
REDUCTION, FLOAT32, NO_ONEDNN = cpu_grok1.REDUCTION, cpu_grok1.FLOAT32, cpu_grok1.WITHOUT_ONEDNN
INT8PACK = cpu_grok1.INT8PACK
# weight, rows, compiling -> the first choice of each level, in the order of LEVELS
CHOICES = {
    (BF16, 1, False): (ROWS, ROWS, NO_ONEDNN, NO_ONEDNN),
    (BF16, 1, True): (REDUCTION,) * 4,
    (FP32, 1, False): (PLAIN,) * 4,
    (FP32, 1, True): (REDUCTION,) * 4,
    (INT8, 1, False): (ROWS, ROWS, INT8PACK, INT8PACK),
    (INT8, 1, True): (ROWS, ROWS, REDUCTION, REDUCTION),
    (INT4, 1, False): (ROWS, ROWS, PLAIN, PLAIN),
    (BF16, 64, False): (PLAIN, TILES, FLOAT32, PLAIN),
    (BF16, 64, True): (PLAIN, FLOAT32, FLOAT32, PLAIN),
    (FP32, 64, False): (PLAIN,) * 4,
    (INT8, 8, False): (TILES, TILES, INT8PACK, INT8PACK),
    (INT8, 64, False): (FLOATS, TILES, FLOAT32, PLAIN),
    (INT4, 64, False): (FLOATS, TILES, FLOAT32, PLAIN),
}


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_first_choice_of_each_level(case):
    weight, rows, compiling = case
    found = [products(level, weight, rows, compiling) for level in LEVELS.values()]
    assert tuple(names[0] for names in found) == CHOICES[case]
    assert all(names[-1] == PLAIN for names in found)


def test_training_in_bfloat16_is_computed_in_float32_without_instructions_for_it():
    for level in LEVELS.values():
        for rows in (1, 64):
            first = products(level, BF16, rows, False, gradients=True)[0]
            assert first == (PLAIN if level.bfloat16 else FLOAT32)
            assert products(level, FP32, rows, False, gradients=True) == (PLAIN,)


@pytest.mark.parametrize(
    ("isa", "bfloat16"),
    [(None, True), ("AVX2", False), ("AVX512_CORE_VNNI", False), ("AVX512_CORE_BF16", True), ("avx10_2", True)],
)
def test_onednns_own_limit_counts(isa, bfloat16, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert cpu_grok1.level.__wrapped__().bfloat16 == bfloat16


# --------------------------------------------------------------------------------------------------------------------
# The products
# --------------------------------------------------------------------------------------------------------------------
def random_weights(outputs, inputs):
    """(weight, scale, its floats in float64) of each kind and some numbers of blocks."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    for dtype in (BF16, FP32):
        weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
        yield weight, None, weight.double()
    for blocks in {1, 2, 4, inputs // 32}:
        scale = (torch.rand(outputs, blocks, generator=generator) * 0.01).bfloat16()
        repeated = scale.double().repeat_interleave(inputs // blocks, dim=-1)
        values = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        yield values, scale, values.double() * repeated
        values = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
        yield pack(values, 4), scale, values.double() * repeated


@needs_kernels
@pytest.mark.parametrize("inputs", [64, 192, 2112])
@pytest.mark.parametrize("outputs", [1, 5, 37])
def test_kernels_sum_in_float32_and_round_once(outputs, inputs):
    generator = torch.Generator().manual_seed(0)
    taken = set()
    for rows in (1, 2, 3, 7):
        for dtype, bound in ((FP32, 1e-7), (BF16, 2**-9)):
            x = torch.randn(rows, inputs, generator=generator).to(dtype)
            for weight, scale, exact in random_weights(outputs, inputs):
                expected, magnitude = x.double() @ exact.T, x.double().abs() @ exact.abs().T
                for takes, product in ((can_multiply_rows, rows_matmul), (can_multiply_tiles, tiled_matmul)):
                    if takes(x, weight, scale):
                        y = product(x, weight, scale)
                        assert y.dtype == dtype
                        assert (y.double() - expected).norm() <= bound * magnitude.norm()
                        taken.add((product, weight.dtype))
    assert len(taken) == 7


@needs_kernels
def test_rows_of_several_experts_and_threads():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 37, 96, generator=generator).bfloat16()
    x, experts = torch.randn(3, 96, generator=generator), torch.tensor([2, 0, 2])
    expected = torch.einsum("sk,snk->sn", x.double(), weight[experts].double())
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for product in (rows_matmul, torch.ops.grok1.cpu_rows):
                torch.testing.assert_close(product(x, weight, None, experts).double(), expected, rtol=0, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_floats_are_those_of_the_plain_dequantisation(dtype):
    for weight, scale, exact in random_weights(37, 1088):
        if scale is not None:
            assert torch.equal(floats(weight, scale, dtype), exact.to(dtype))
            assert torch.equal(floats(weight, scale, dtype), dequantise(weight, scale, dtype))
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40, 3.3e38, 1.00390625, 1.01171875])
    assert torch.equal(
        floats(special[None], None, BF16)[0].view(torch.int16)[1:], special.bfloat16().view(torch.int16)[1:]
    )
    assert floats(special[None], None, BF16)[0, 0].isnan()


@pytest.mark.parametrize("shape", [(1, 1, 72), (1, 5, 72), (2, 3, 64), (0, 3, 64)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64, torch.float16])
def test_a_projection_at_each_level(level, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(shape, generator=generator), torch.randn(40, shape[-1], generator=generator)
    x, weight = x.to(dtype), weight.to(dtype)
    with torch.no_grad():
        y, expected = linear(x, weight), x.double() @ weight.double().T
    assert y.dtype == dtype
    assert y.shape == expected.shape
    assert (y - expected).norm() <= torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().T).norm()


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("part", [64, 2**22])
def test_gradients_at_each_level(level, rows, part, monkeypatch):
    monkeypatch.setattr(cpu_grok1, "FLOAT32_ELEMENTS", part)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, 64, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(24, 64, generator=generator).bfloat16().requires_grad_()
    gradient = torch.randn(1, rows, 24, generator=generator).bfloat16()
    actual = torch.autograd.grad(linear(x, weight), (x, weight), gradient)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = torch.autograd.grad(F.linear(*wide), wide, gradient.double())
    for found, exact in zip(actual, expected, strict=True):
        assert found.dtype == BF16
        assert (found - exact).norm() <= 2**-8 * exact.norm()


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(small_config):
    torch.manual_seed(0)
    return Grok1ForCausalLM(small_config).bfloat16()


def test_a_prompt_and_steps_at_each_level_differ_by_rounding_only(level, model):
    tokens = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = copy.deepcopy(model).float()(tokens).logits
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        cache = (output := again(tokens[:, :8], use_cache=True)).past_key_values
        logits = [output.logits]
        logits += [again(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(8, 12)]
    assert (torch.cat(logits, dim=1) - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_training_with_checkpointing_at_each_level(level, model, autocast):
    """The backward pass computes each layer again and must save the same tensors."""
    tokens = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model).float()
    reference(tokens, labels=tokens).loss.backward()
    trained = (model.float() if autocast else model).train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = trained(tokens, labels=tokens).loss
    loss.backward()
    for (name, actual), expected in zip(trained.named_parameters(), reference.parameters(), strict=True):
        assert (actual.grad - expected.grad).norm() <= 0.05 * expected.grad.norm(), name


@pytest.mark.parametrize("name", ["avx2", "avx2, no compiler"])
def test_the_model_compiles_whole_without_bfloat16_instructions(name, model, monkeypatch):
    if LEVELS[name].kernels and kernels() is None:
        pytest.skip("needs a C compiler and a processor with AVX2")
    monkeypatch.setattr(cpu_grok1, "level", lambda: LEVELS[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for length in (1, 7):
            tokens = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(0))
            expected = model(tokens, use_cache=False).logits
            actual = compiled(tokens, use_cache=False).logits
            assert (actual.float() - expected.float()).norm() <= 0.02 * expected.float().norm()


# --------------------------------------------------------------------------------------------------------------------
# The compiler, and torch limited to AVX2
# --------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def warnings(monkeypatch, tmp_path):
    """What is logged; libraries are kept in a fresh folder."""
    found: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(kernels_grok1.logger, "warning", found.append)
    monkeypatch.setattr(kernels_grok1.logger, "warning_once", found.append)
    return found


@needs_kernels
def test_compiled_once_and_said_once(warnings, tmp_path):
    for _ in range(2):
        library = kernels.__wrapped__()
        assert library is not None
        assert len(warnings) == 1
        assert warnings[0].startswith("Compiling Grok-1's products for the CPU")
    assert [path.name for path in (tmp_path / "grok1").iterdir()] == [os.path.basename(library._name)]


@needs_kernels
def test_torchs_products_are_taken_where_compiling_fails_or_is_declined(warnings, tmp_path, monkeypatch):
    monkeypatch.setenv("GROK1_CPU_KERNELS", "0")
    assert kernels.__wrapped__() is None
    assert warnings == []
    monkeypatch.delenv("GROK1_CPU_KERNELS")
    monkeypatch.setenv("CC", "false")
    assert kernels.__wrapped__() is None
    assert "could not be compiled with `false`" in warnings[-1]
    assert not list((tmp_path / "grok1").iterdir())
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert kernels.__wrapped__() is None
    assert len(warnings) == 2  # a machine without a compiler is told nothing


def test_golden_data_with_torch_limited_to_avx2(tmp_path):
    """Inductor keeps what it generates without asking for this limit: it gets a folder of its own."""
    variables = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    here = os.path.dirname(__file__)
    tests = [os.path.join(here, "test_golden_bf16.py"), os.path.join(here, "test_golden_logits.py")]
    # -P: the package that is installed, and not a folder of its name in the working directory.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "bf16 or fused-eager"]
    result = subprocess.run([*command, *tests], env=os.environ | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
