"""Writes one tensor file of xAI's checkpoint, byte for byte as pickle protocol 4 and numpy 1.26 would.

The bytes around the arrays depend on nothing but dtypes and shapes, so they are made first, and the arrays are
streamed into place. The opcodes, the memo and the frames follow CPython's C pickler:

- bytes of 64 KiB and more lie outside any frame;
- a frame is closed before the first object that follows 64 KiB of it, and at the end of the pickle;
- a frame of less than four bytes is written without its header;
- an interned string, a global or a one-byte string that occurs again is a reference to the memo.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grok1.files import ITEMSIZE, atomic_write


_FRAME_TARGET = 64 * 1024
_FRAME_MINIMUM = 4

_MEMOIZE, _STACK_GLOBAL, _REDUCE, _BUILD, _NEWOBJ = b"\x94", b"\x93", b"R", b"b", b"\x81"
_MARK, _TUPLE, _EMPTY_TUPLE, _EMPTY_DICT, _SETITEMS = b"(", b"t", b")", b"}", b"u"
_TUPLE_OF = {1: b"\x85", 2: b"\x86", 3: b"\x87"}
_NONE, _TRUE, _FALSE, _STOP = b"N", b"\x88", b"\x89", b"."

# dtype: (how numpy names it, the state that it pickles). bfloat16 is named by its class; 64 are flags of its dtype.
_DTYPE_NAME = {"float32": "f4", "int8": "i1"}
_DTYPE_STATE = {"float32": ("<", -1, 0), "int8": ("|", -1, 0), "bfloat16": ("<", 2, 64)}


@dataclass(frozen=True)
class TensorFrame:
    """The bytes of a tensor file around its arrays: `before` weight `between` scales `after`.

    Without scales, `between` is empty. Shapes are those of the arrays as stored, C order.
    """

    dtype: str
    shape: tuple[int, ...]
    scales_shape: tuple[int, ...] | None
    before: bytes
    between: bytes
    after: bytes

    @property
    def weight_nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def scales_nbytes(self) -> int:
        return 0 if self.scales_shape is None else math.prod(self.scales_shape) * ITEMSIZE["bfloat16"]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        around = len(self.before) + len(self.between) + len(self.after)
        return around + self.weight_nbytes + self.scales_nbytes


def tensor_frame(shape: tuple[int, ...], scales_shape: tuple[int, ...] | None = None) -> TensorFrame:
    """What surrounds a float32 array of `shape`, or an int8 one if there are bfloat16 scales.

    Raises:
        ValueError: an array of a single byte, which Python would pickle as a reference.
    """
    dtype = "float32" if scales_shape is None else "int8"
    if math.prod(shape) * ITEMSIZE[dtype] < 2:
        raise ValueError(f"expected a weight of at least two bytes, found {dtype} {shape}")
    pickler = _Pickler()
    if scales_shape is None:
        pickler.array(dtype, shape)
    else:
        pickler.quantised(shape, scales_shape)
    parts = pickler.finish()
    between, after = (b"", parts[1]) if scales_shape is None else (parts[1], parts[2])
    return TensorFrame(dtype, shape, scales_shape, parts[0], between, after)


def write_tensor_file(
    path: Path,
    frame: TensorFrame,
    weight: Iterable[np.ndarray],
    scales: Callable[[], np.ndarray] | None = None,
) -> None:
    """Writes a tensor file; it appears under its name when all of its bytes are on the disk.

    Args:
        path: the file's final name.
        frame: from `tensor_frame`.
        weight: the weight in C order, in any number of pieces; each is written before the next one is asked for.
        scales: called once after the last piece; returns the scales as bfloat16 bits (uint16), C order.

    Raises:
        ValueError: the pieces are not as many bytes as the frame asks for. No file is left.
        ConversionError: the file cannot be written. No file is left.
    """
    with atomic_write(path) as file:
        file.write(frame.before)
        written = 0
        for piece in weight:
            written += file.write(np.ascontiguousarray(piece).data)
        if written != frame.weight_nbytes:
            raise ValueError(f"{path.name}: expected {frame.weight_nbytes} bytes of weight, found {written}")
        file.write(frame.between)
        if scales is not None:
            written = file.write(np.ascontiguousarray(scales()).data)
            if written != frame.scales_nbytes:
                raise ValueError(f"{path.name}: expected {frame.scales_nbytes} bytes of scales, found {written}")
        file.write(frame.after)


class _Pickler:
    """The opcodes of a tensor file, in pieces: a new piece begins after the bytes of each array."""

    def __init__(self) -> None:
        self.pieces = [bytearray()]
        self.memo: dict[str, int] = {}
        self.memo_size = 0
        # The open frame: the piece and the position of its header, and how many bytes it holds (arrays included).
        self.frame: tuple[bytearray, int] | None = None
        self.frame_length = 0
        self.pieces[0] += b"\x80\x04"

    # -- frames

    def write(self, data: bytes) -> None:
        if self.frame is None:
            self.frame, self.frame_length = (self.pieces[-1], len(self.pieces[-1])), 0
            self.pieces[-1] += b"\x95" + bytes(8)
        self.pieces[-1] += data
        self.frame_length += len(data)

    def close_frame(self) -> None:
        if self.frame is not None:
            piece, position = self.frame
            if self.frame_length >= _FRAME_MINIMUM:
                struct.pack_into("<Q", piece, position + 1, self.frame_length)
            else:
                del piece[position : position + 9]
            self.frame = None

    def begin_object(self) -> None:
        """The pickler looks whether the frame is full before each object, atoms included, and nowhere else."""
        if self.frame is not None and self.frame_length >= _FRAME_TARGET:
            self.close_frame()

    def finish(self) -> list[bytes]:
        self.write(_STOP)
        self.close_frame()
        return [bytes(piece) for piece in self.pieces]

    # -- objects

    def memoize(self, key: str | None = None) -> None:
        """Gives the object just written the next number; `key` names those that occur again."""
        if key is not None:
            self.memo[key] = self.memo_size
        self.memo_size += 1
        self.write(_MEMOIZE)

    def remembered(self, key: str) -> bool:
        if key in self.memo:
            self.write(b"h" + bytes([self.memo[key]]))
            return True
        return False

    def atom(self, opcode: bytes) -> None:
        self.begin_object()
        self.write(opcode)

    def integer(self, value: int) -> None:
        if 0 <= value <= 0xFF:
            self.atom(b"K" + struct.pack("<B", value))
        elif 0 <= value <= 0xFFFF:
            self.atom(b"M" + struct.pack("<H", value))
        else:
            self.atom(b"J" + struct.pack("<i", value))

    def text(self, value: str) -> None:
        self.begin_object()
        if not self.remembered(f"text {value}"):
            self.write(b"\x8c" + bytes([len(value)]) + value.encode())
            self.memoize(f"text {value}")

    def placeholder(self) -> None:
        """The bytes b"b", with which numpy makes an empty array."""
        self.begin_object()
        if not self.remembered("bytes b"):
            self.write(b"C\x01b")
            self.memoize("bytes b")

    def name(self, module: str, name: str) -> None:
        self.begin_object()
        if not self.remembered(f"global {module} {name}"):
            self.text(module)
            self.text(name)
            self.write(_STACK_GLOBAL)
            self.memoize(f"global {module} {name}")

    def end_tuple(self, opcode: bytes) -> None:
        self.write(opcode)
        self.memoize()

    def shape(self, sizes: tuple[int, ...]) -> None:
        self.begin_object()
        if len(sizes) not in _TUPLE_OF:
            self.write(_MARK)
        for size in sizes:
            self.integer(size)
        self.end_tuple(_TUPLE_OF.get(len(sizes), _TUPLE))

    def dtype(self, dtype: str) -> None:
        order, width, flags = _DTYPE_STATE[dtype]
        self.begin_object()
        self.name("numpy", "dtype")
        self.begin_object()
        if dtype == "bfloat16":
            self.name("ml_dtypes", "bfloat16")
        else:
            self.text(_DTYPE_NAME[dtype])
        self.atom(_FALSE)
        self.atom(_TRUE)
        self.end_tuple(_TUPLE_OF[3])
        self.write(_REDUCE)
        self.memoize()
        self.begin_object()
        self.write(_MARK)
        self.integer(3)
        self.text(order)
        for _ in range(3):
            self.atom(_NONE)
        for value in (width, width, flags):
            self.integer(value)
        self.end_tuple(_TUPLE)
        self.write(_BUILD)

    def payload(self, nbytes: int) -> None:
        """Leaves room for the bytes of an array."""
        if nbytes <= 0xFF:
            header = b"C" + struct.pack("<B", nbytes)
        elif nbytes <= 0xFFFFFFFF:
            header = b"B" + struct.pack("<I", nbytes)
        else:
            header = b"\x8e" + struct.pack("<Q", nbytes)
        self.begin_object()
        if nbytes >= _FRAME_TARGET:
            self.close_frame()
            self.pieces[-1] += header
        else:
            self.write(header)
            self.frame_length += nbytes
        self.pieces.append(bytearray())
        self.memoize()

    def array(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.begin_object()
        self.name("numpy.core.multiarray", "_reconstruct")
        self.begin_object()
        self.name("numpy", "ndarray")
        self.shape((0,))
        self.placeholder()
        self.end_tuple(_TUPLE_OF[3])
        self.write(_REDUCE)
        self.memoize()
        self.begin_object()
        self.write(_MARK)
        self.integer(1)
        self.shape(shape)
        self.dtype(dtype)
        self.atom(_FALSE)
        self.payload(math.prod(shape) * ITEMSIZE[dtype])
        self.end_tuple(_TUPLE)
        self.write(_BUILD)

    def quantised(self, shape: tuple[int, ...], scales_shape: tuple[int, ...]) -> None:
        self.begin_object()
        self.name("__main__", "QuantizedWeight8bit")
        self.atom(_EMPTY_TUPLE)
        self.write(_NEWOBJ)
        self.memoize()
        self.atom(_EMPTY_DICT)
        self.memoize()
        self.write(_MARK)
        self.text("weight")
        self.array("int8", shape)
        self.text("scales")
        self.array("bfloat16", scales_shape)
        self.write(_SETITEMS)
        self.write(_BUILD)
