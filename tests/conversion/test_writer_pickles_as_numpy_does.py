"""The writer's bytes are those of CPython's pickler and numpy 1.26: golden and true files, and any other shape."""

import io
import pickle
import sys
import types

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from xai_files import float_file, int8_file, read_bytes, tensor_files

from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.pickle import locate_arrays
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file


def rewritten(path, folder):
    tensor = read_tensor_file(path)
    frame = tensor_frame(tensor.weight.shape, tensor.scales and tensor.scales.shape)
    pieces = (tensor.weight.read_rows((), i, i + 1) for i in range(tensor.weight.shape[0]))
    write_tensor_file(folder / path.name, frame, pieces, tensor.scales and tensor.scales.read)
    return (folder / path.name).read_bytes()


@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
def test_every_golden_file_is_written_byte_for_byte(golden, tmp_path, name):
    for path in tensor_files(golden / name / "ckpt-0"):
        assert rewritten(path, tmp_path) == path.read_bytes(), path.name


def test_every_true_norm_and_router_is_written_byte_for_byte(assets):
    for path in tensor_files(assets / "small-files"):
        assert float_file(read_tensor_file(path).weight.read()) == path.read_bytes(), path.name


class Numpy126(pickle.Pickler):
    """Python's own pickler, shown what numpy 1.26 and ml_dtypes show it; frames, memo and opcodes are its own."""

    def reducer_override(self, thing):
        if isinstance(thing, FakeArray):
            state = (1, thing.shape, FakeDtype(thing.dtype), False, thing.data)
            fresh = tuple(
                range(1)
            )  # A constant would be one object for all arrays, and a reference from the second on.
            return RECONSTRUCT, (NDARRAY, fresh, b"b"), state
        if isinstance(thing, FakeDtype):
            if thing.name == "bfloat16":
                return DTYPE, (BFLOAT16, False, True), (3, "<", None, None, None, 2, 2, 64)
            code, order = {"float32": ("f4", "<"), "int8": ("i1", "|")}[thing.name]
            return DTYPE, (code, False, True), (3, order, None, None, None, -1, -1, 0)
        return NotImplemented


class FakeArray:
    def __init__(self, dtype, shape, data):
        self.dtype, self.shape, self.data = dtype, shape, data


class FakeDtype:
    def __init__(self, name):
        self.name = name


def named(module, name):
    # As in C: the names are interned, so that the second "numpy" is a reference to the first.
    return type(name, (), {"__module__": sys.intern(module), "__qualname__": sys.intern(name)})


RECONSTRUCT = named("numpy.core.multiarray", "_reconstruct")
NDARRAY, DTYPE = named("numpy", "ndarray"), named("numpy", "dtype")
BFLOAT16 = named("ml_dtypes", "bfloat16")
QUANTIZED = named("__main__", "QuantizedWeight8bit")


@pytest.fixture(scope="module", autouse=True)
def modules():
    """The pickler looks every global up; these modules hold what it shall find."""
    fakes = {}
    for cls in (RECONSTRUCT, NDARRAY, DTYPE, BFLOAT16, QUANTIZED):
        fakes.setdefault(cls.__module__, types.ModuleType(cls.__module__))
        setattr(fakes[cls.__module__], cls.__name__, cls)
    yield fakes


def python_pickle(fakes, thing):
    real = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        buffer = io.BytesIO()
        Numpy126(buffer, protocol=4).dump(thing)
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return buffer.getvalue()


# Around 64 KiB (frames), 256 bytes (short strings) and 256, 65536 (integers), where the pickler changes its ways.
quick = settings(max_examples=200, deadline=None, derandomize=True, phases=[Phase.generate])
sizes = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 127, 255, 256, 257]))
lengths = st.one_of(
    st.integers(2, 700), st.integers(65_536 - 260, 65_536 + 40), st.integers(16_384 - 64, 16_384 + 8), st.just(70_000)
)


@quick
@given(shape=st.one_of(st.tuples(lengths), st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes)))
def test_any_float32_file_is_what_python_writes(modules, shape):
    values = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    data = float_file(values)
    assert data == python_pickle(modules, FakeArray("float32", shape, values.tobytes()))
    assert read_bytes(data).weight.shape == shape


@quick
@given(lead=st.lists(st.integers(1, 3), max_size=1), rows=st.integers(1, 4), columns=lengths, groups=st.integers(1, 2))
def test_any_int8_file_is_what_python_writes(modules, lead, rows, columns, groups):
    shape, scales_shape = (*lead, rows * groups, columns), (*lead, groups, columns)
    weight = (np.arange(np.prod(shape)) % 251).astype(np.uint8).view(np.int8).reshape(shape)
    bits = (np.arange(np.prod(scales_shape)) % 30_000).astype("<u2").reshape(scales_shape)
    thing = QUANTIZED()
    thing.weight = FakeArray("int8", shape, weight.tobytes())
    thing.scales = FakeArray("bfloat16", scales_shape, bits.tobytes())
    data = int8_file(weight, bits)
    assert data == python_pickle(modules, thing)
    assert tensor_frame(shape, scales_shape).size == len(data)
    assert read_bytes(data).scales.shape == scales_shape


def test_a_frame_that_fills_up_at_any_opcode_is_closed_where_python_closes_it(modules):
    for n in range(16_300, 16_390):
        values = np.zeros(n, "<f4")
        assert float_file(values) == python_pickle(modules, FakeArray("float32", (n,), values.tobytes())), n
    for n in range(65_100, 65_540):
        thing = QUANTIZED()
        thing.weight = FakeArray("int8", (n, 1), bytes(n))
        thing.scales = FakeArray("bfloat16", (1, 1), bytes(2))
        assert int8_file(np.zeros((n, 1)), np.zeros((1, 1))) == python_pickle(modules, thing), n


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path):
    frame = tensor_frame((4, 8), (2, 8))
    path = tmp_path / "tensor00005_000"

    def broken():
        yield np.zeros((2, 8), np.int8)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_tensor_file(path, frame, broken())
    with pytest.raises(ValueError, match="tensor00005_000: expected 32 bytes of weight, found 16"):
        write_tensor_file(path, frame, [np.zeros((2, 8), np.int8)])
    with pytest.raises(ValueError, match="tensor00005_000: expected 32 bytes of scales, found 16"):
        write_tensor_file(path, frame, [np.zeros((4, 8), np.int8)], lambda: np.zeros((1, 8), np.uint16))
    assert list(tmp_path.iterdir()) == []


def test_a_weight_of_one_byte_is_refused():
    with pytest.raises(ValueError, match="at least two bytes"):
        tensor_frame((1, 1), (1, 1))


def test_an_array_beyond_four_gigabytes_has_a_long_length():
    frame = tensor_frame((2**20, 2**11))
    assert frame.before.endswith(b"\x8e" + (2**33).to_bytes(8, "little"))

    def read_at(offset, count):
        """The file with zeros for its array, without the array."""
        before, end = len(frame.before), len(frame.before) + frame.weight_nbytes
        if offset < before:
            return (frame.before + bytes(count))[offset : offset + count]
        return frame.after[offset - end : offset - end + count]

    weight, scales = locate_arrays(read_at, frame.size)
    assert (weight.dtype, weight.shape, weight.offset, scales) == ("float32", (2**20, 2**11), len(frame.before), None)
