"""Whatever a file holds: the right arrays, or one CheckpointError that names it. Nothing runs, hangs or grows."""

import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest
from xai_files import float_file, int8_file, read_bytes, unpickled

from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.writer import tensor_frame
from grok1.errors import CheckpointError


NAME = "tensor00007_000"
VECTOR = float_file(np.linspace(-1, 1, 5, dtype=np.float32))
ROUTER = float_file(np.arange(24, dtype=np.float32).reshape(6, 4))
EXPERTS = int8_file(np.arange(64, dtype=np.int8).reshape(2, 8, 4), np.full((2, 2, 4), 0x3C00, np.uint16))
MATRIX = int8_file(np.arange(40, dtype=np.int8).reshape(8, 5), np.full((1, 5), 0x3C01, np.uint16))
LONG = int8_file(np.zeros((64, 1100), np.int8), np.full((8, 1100), 0x3C02, np.uint16))  # the weight outside of frames


def refusal(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_bytes(data, NAME)
    assert NAME in str(caught.value)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_the_files_that_are_damaged_below_are_sound():
    for data in (VECTOR, ROUTER, EXPERTS, MATRIX, LONG):
        tensor = read_bytes(data)
        arrays = [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]
        assert [(a.dtype, a.shape, data[a.offset : a.offset + a.nbytes]) for a in arrays] == unpickled(data)


# ---------------------------------------------------------------------------------------------------------------------
# Code


class Command:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "wrapped", [lambda command: command, lambda command: {"weight": command}, lambda c: [1, (c,)]]
)
def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_runs_nothing(tmp_path, protocol, wrapped):
    marker = tmp_path / "marker"
    path = tmp_path / NAME
    path.write_bytes(pickle.dumps(wrapped(Command(marker)), protocol=protocol))
    with pytest.raises(CheckpointError) as caught:
        read_tensor_file(path)
    assert NAME in str(caught.value)
    if protocol >= 4 and wrapped(0) == [1, (0,)]:
        assert "opcode EMPTY_LIST" in str(caught.value)  # refused before the global is reached
    else:
        assert "posix.system" in str(caught.value)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # The file was live.


def test_a_command_in_the_place_of_the_scales_is_refused_by_name(tmp_path):
    marker = tmp_path / "marker"
    attack = pickle.dumps(Command(marker), protocol=4)[11:-1]  # without protocol, frame and stop
    frame = tensor_frame((8, 5), (1, 5))
    begin = frame.before + bytes(40)
    data = bytearray(begin + b"\x94tb\x94" + b"\x8c\x06scales\x94" + attack + b"ub.")
    struct.pack_into("<Q", data, 3, len(data) - 11)
    assert "posix.system" in refusal(bytes(data))
    assert not marker.exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy", "load"),
        ("builtins", "eval"),
        ("__main__", "QuantizedWeight4bit"),
        ("ml_dtypes", "float8_e4m3fn"),
        ("numpy.core", "multiarray._reconstruct"),
    ],
)
def test_only_the_five_globals_are_known(module, name):
    data = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
    assert f"refers to {module}.{name}" in refusal(data + b"\x93.")


def test_a_name_that_would_write_to_the_terminal_is_escaped():
    assert r"refers to 'os.\x1b[2J'" in refusal(b"\x80\x04\x8c\x02os\x8c\x04\x1b[2J\x93.")


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of damage, each told apart


def edited(data: bytes, old: bytes, new: bytes) -> bytes:
    """With `old` replaced and the length of the first frame put right."""
    assert data.count(old) >= 1
    result = bytearray(data.replace(old, new, 1))
    (length,) = struct.unpack_from("<Q", result, 3)
    struct.pack_into("<Q", result, 3, length + len(result) - len(data))
    return bytes(result)


CASES = {
    "empty": (b"", "an empty file"),
    "zero-filled": (bytes(5000), "5000 bytes that begin with zero bytes (an unfinished download)"),
    "a hole at the end": (
        LONG[:200] + bytes(len(LONG) - 200),
        "zero bytes from byte 70598 on (an unfinished download)",
    ),
    "truncated header": (VECTOR[:60], "found 60 bytes (truncated)"),
    "truncated array": (LONG[:40000], "expected at least 70598 bytes, found 40000 bytes (truncated)"),
    "over-long": (ROUTER + b"\0", "(over-long: bytes follow the tensor)"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html><'"),
    "protocol 2": (pickle.dumps(1, protocol=2), "expected a pickle of protocol 4, found protocol 2"),
    "protocol 5": (b"\x80\x05" + VECTOR[2:], "expected a pickle of protocol 4, found protocol 5"),
    "Fortran order": (edited(ROUTER, b"b\x89C", b"b\x88C"), "an array in Fortran order"),
    "big-endian": (edited(ROUTER, b"\x8c\x01<", b"\x8c\x01>"), "big-endian numbers"),
    "float64": (edited(ROUTER, b"\x02f4", b"\x02f8"), "expected dtype float32, int8 or bfloat16, found 'f8'"),
    "objects": (edited(ROUTER, b"\x02f4", b"\x02O8"), "an array of Python objects"),
    "int8 without scales": (
        edited(edited(edited(ROUTER, b"\x02f4", b"\x02i1"), b"\x8c\x01<", b"\x8c\x01|"), b"K\x06K\x04", b"K\x18K\x04"),
        "a int8 array without scales",
    ),
    "another shape": (edited(ROUTER, b"K\x06K\x04", b"K\x06K\x05"), "expected 120 bytes for float32 (6, 5), found 96"),
    "negative shape": (edited(ROUTER, b"K\x06K\x04", b"J\xfa\xff\xff\xffJ\xfc\xff\xff\xff"), "positive sizes"),
    "scales of another matrix": (
        edited(MATRIX, b"K\x01K\x05\x86", b"K\x05K\x01\x86"),
        "scales (5, 1) for a weight (8, 5)",
    ),
    "scales that do not divide": (
        int8_file(np.zeros((8, 5), np.int8), np.zeros((3, 5), np.uint16)),
        "scales (3, 5) for a weight (8, 5)",
    ),
    "not a tensor": (pickle.dumps("text", protocol=4), "expected an array or a QuantizedWeight8bit"),
    "two objects": (b"\x80\x04" + VECTOR[11:-1] + VECTOR[11:], "expected one object, found 2 objects"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_damage_is_told(case):
    data, expected = CASES[case]
    assert expected in refusal(data)


def test_a_named_pipe_a_folder_and_a_missing_file_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "nothing"):
        with pytest.raises(CheckpointError):
            read_tensor_file(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

BASES = (VECTOR, ROUTER, EXPERTS, MATRIX)
OPCODES = (
    b"\x80\x95\x8c\x94\x93KMJN\x88\x89)\x85\x86\x87(tR}sub\x81hjCB\x8e.cioldae0123\x82\x83\x84Q]\x90\x91\x98X\x8d\x8a"
)
WORDS = (
    b"f8",
    b"O8",
    b"i1",
    b"f4",
    b">",
    b"<",
    b"|",
    b"numpy",
    b"ndarray",
    b"dtype",
    b"builtins",
    b"eval",
    b"scales",
    b"weight",
)


def mutated(rng: np.random.Generator) -> bytes:
    data = bytearray(BASES[rng.integers(len(BASES))])
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data))) if data else 0
        end = min(len(data), at + int(rng.integers(1, 24)))
        match rng.integers(9):
            case 0 if data:  # flip a bit
                data[at % len(data)] ^= 1 << int(rng.integers(8))
            case 1:  # cut off
                del data[at:]
            case 2:  # cut out
                del data[at:end]
            case 3:  # opcodes
                data[at:at] = bytes(rng.choice(np.frombuffer(OPCODES, np.uint8), rng.integers(1, 6)))
            case 4:  # from another place of another file
                other = BASES[rng.integers(len(BASES))]
                begin = int(rng.integers(len(other)))
                data[at:end] = other[begin : begin + int(rng.integers(1, 60))]
            case 5:  # a huge length
                length = int(rng.choice([0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63]))
                field = bytes([rng.choice([0x95, 0x8E])]) + struct.pack("<Q", length)
                data[at:end] = field if rng.integers(2) else b"B" + struct.pack("<I", length % 2**32)
            case 6:  # names and dtypes
                old, new = WORDS[rng.integers(len(WORDS))], WORDS[rng.integers(len(WORDS))]
                data = bytearray(bytes(data).replace(old, new, int(rng.integers(1, 3))))
            case 7:  # references into the memo, nests
                data[at:at] = b"".join(
                    b"h" + bytes([rng.integers(40)]) + b"\x94\x86" for _ in range(rng.integers(1, 9))
                )
            case 8 if data:  # any byte
                data[at % len(data)] = rng.integers(256)
    return bytes(data)


def test_of_thirty_thousand_mutations_each_is_refused_or_read_as_pickle_reads_it():
    rng = np.random.default_rng(1)
    accepted = refused = 0
    slowest = 0.0
    for _ in range(30_000):
        data = mutated(rng)
        begin = time.perf_counter()
        try:
            tensor = read_bytes(data, NAME)
        except CheckpointError as error:
            assert NAME in str(error)
            assert len(str(error)) < 1500
            refused += 1
        else:
            arrays = [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]
            found = [(a.dtype, a.shape, data[a.offset : a.offset + a.nbytes]) for a in arrays]
            assert found == unpickled(data)
            accepted += 1
        slowest = max(slowest, time.perf_counter() - begin)
    assert accepted > 1000
    assert refused > 20_000
    assert slowest < 1


def test_every_single_bit_flip_is_refused_or_read_as_pickle_reads_it():
    for base in BASES:
        for bit in range(8 * len(base)):
            data = bytearray(base)
            data[bit // 8] ^= 1 << bit % 8
            try:
                tensor = read_bytes(bytes(data), NAME)
            except CheckpointError:
                continue
            arrays = [tensor.weight] if tensor.scales is None else [tensor.weight, tensor.scales]
            assert [(a.dtype, a.shape, bytes(data[a.offset : a.offset + a.nbytes])) for a in arrays] == unpickled(data)


def test_every_truncation_is_refused():
    for base in BASES:
        for length in range(len(base)):
            refusal(base[:length])


BOMBS = {
    "tuples that double": b"\x80\x04"
    + b")\x94"
    + b"".join(b"h" + bytes([i]) * 2 for i in b"")
    + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(200))
    + b"b.",
    "tuples that nest": b"\x80\x04)" + b"\x85" * 900 + b".",
    "endless opcodes": b"\x80\x04" + b"N" * 10**6,
    "endless marks": b"\x80\x04" + b"(" * 10**6,
    "a huge array": b"\x80\x04\x8e" + struct.pack("<Q", 2**62),
    "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**63),
    "a huge reference": b"\x80\x04j" + struct.pack("<I", 2**32 - 1),
    "a dict in itself": b"\x80\x04}\x94(\x8c\x06weighth\x00u.",
    "an array in itself": VECTOR[:11].replace(VECTOR[2:11], b"") + VECTOR[11:84] + b"(K\x01h\x09h\x09\x89h\x09tb.",
    "a shape beyond numbers": edited(ROUTER, b"K\x06K\x04\x86", b"(" + b"J\xff\xff\xff\x7f" * 300 + b"t"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_nothing(bomb):
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        refusal(BOMBS[bomb])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    assert time.perf_counter() - begin < 1
