"""Locates the arrays in a tensor file of xAI's checkpoint without unpickling it.

Such a file is a pickle of protocol 4, as numpy 1.x writes it: one float32 array, or a `QuantizedWeight8bit` with int8
`weight` and bfloat16 `scales`. A small stack machine walks its opcodes. It knows the five globals of such a file and
nothing else. It calls nothing, imports nothing and never reads an array: its result is where each array lies.
"""

from __future__ import annotations

import math
import pickletools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

from grok1.files import ITEMSIZE


@dataclass(frozen=True)
class _Global:
    """A global by its name; it is never looked up."""

    module: str
    name: str


_RECONSTRUCT = _Global("numpy.core.multiarray", "_reconstruct")
_NDARRAY = _Global("numpy", "ndarray")
_DTYPE = _Global("numpy", "dtype")
_BFLOAT16 = _Global("ml_dtypes", "bfloat16")
_QUANTIZED = _Global("__main__", "QuantizedWeight8bit")
_GLOBALS = frozenset({_RECONSTRUCT, _NDARRAY, _DTYPE, _BFLOAT16, _QUANTIZED})

# A file of the release has about 100 opcodes, and its longest string has 21 characters.
_MAX_OPCODES = 1000
_WINDOW = 4096
_OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}
_DOWNLOAD_AGAIN = "The download is not finished or is damaged: fetch the file again."
_NEVER_UNPICKLE = "Nothing was executed. Do not load this file with pickle: it is not xAI's."


class RefusedPickleError(ValueError):
    """Not a tensor as xAI writes it. The caller knows the file's name and makes a CheckpointError of it."""

    def __init__(self, expected: str, found: str, next_step: str = ""):
        super().__init__(expected, found)
        self.expected, self.found, self.next_step = expected, found, next_step


@dataclass(eq=False)
class ArrayPlace:
    """An array as the pickle describes it: dtype "float32", "int8" or "bfloat16", C order, little-endian.

    `dtype` is empty until the array has got its state.
    """

    dtype: str = ""
    shape: tuple[int, ...] = ()
    offset: int = 0


def locate_arrays(read_at: Callable[[int, int], bytes], size: int) -> tuple[ArrayPlace, ArrayPlace | None]:
    """Where weight and scales lie in a file of `size` bytes.

    Args:
        read_at: `read_at(offset, count)` returns up to `count` bytes. It is asked for a few kilobytes at most.

    Returns:
        A float32 weight and None, or an int8 weight (..., K, N) and bfloat16 scales (..., G, N), K a multiple of G.

    Raises:
        RefusedPickleError: the file is anything else.
    """
    _check_beginning(read_at(0, _WINDOW), size)
    return _Walker(_Cursor(read_at, size)).run()


def _check_beginning(head: bytes, size: int) -> None:
    expected = "a pickle of protocol 4"
    if size == 0:
        raise RefusedPickleError(expected, "an empty file", _DOWNLOAD_AGAIN)
    if head[0] == 0:
        raise RefusedPickleError(
            expected, f"{size} bytes that begin with zero bytes (an unfinished download)", _DOWNLOAD_AGAIN
        )
    if head.startswith(b"version https://git-lfs"):
        raise RefusedPickleError(expected, "a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull.")
    if head[:1] != b"\x80":
        # Protocols 0 and 1 begin with any opcode. If such a file names a global in its first bytes, say which.
        _refuse_text_global(head)
        raise RefusedPickleError(expected, f"a file that begins with {head[:16]!r}")


def _refuse_global(found: _Global) -> NoReturn:
    name = f"{found.module}.{found.name}"[:200]
    name = name if name.isprintable() else ascii(name)
    raise RefusedPickleError(
        "only numpy arrays and QuantizedWeight8bit", f"a pickle that refers to {name}", _NEVER_UNPICKLE
    )


def _refuse_text_global(data: bytes) -> None:
    """Refuses by name the first foreign global that `data` spells in the way of protocols 0 to 3, if there is one."""
    foreign = None
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("GLOBAL", "INST"):
                found = _Global(*str(argument).split(" ", 1))
                if found not in _GLOBALS:
                    foreign = found
                    break
    except ValueError:
        pass  # `data` is only the beginning of a file.
    if foreign is not None:
        _refuse_global(foreign)


class _Cursor:
    """A position in the file, with bounded reads: at most one small window of the file is in memory."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int):
        self.read_at, self.size = read_at, size
        self.position = 0
        self.frame_end: int | None = None
        self.window, self.window_start = b"", 0

    def _advance(self, count: int) -> int:
        """Moves on by `count` bytes, which must lie in the file and in the current frame; returns where they begin."""
        begin, end = self.position, self.position + count
        if end > self.size:
            raise RefusedPickleError(f"at least {end} bytes", f"{self.size} bytes (truncated)", _DOWNLOAD_AGAIN)
        if self.frame_end is not None:
            if end > self.frame_end:
                raise RefusedPickleError(
                    f"the frame to end at byte {self.frame_end}", f"an opcode that ends at byte {end}"
                )
            if end == self.frame_end:
                self.frame_end = None
        self.position = end
        return begin

    def take(self, count: int) -> bytes:
        """The next `count` bytes; at most 255 (every field but the arrays is that small)."""
        begin = self._advance(count)
        if not self.window_start <= begin <= begin + count <= self.window_start + len(self.window):
            self.window, self.window_start = self.read_at(begin, _WINDOW), begin
            if len(self.window) < count:
                raise RefusedPickleError(f"{self.size} bytes", "a file that became shorter while it was being read")
        start = begin - self.window_start
        return self.window[start : start + count]

    def skip(self, count: int) -> int:
        """Passes over `count` bytes without reading them; returns where they begin."""
        return self._advance(count)

    def begin_frame(self, length: int) -> None:
        if self.frame_end is not None:
            raise RefusedPickleError(
                f"the frame to end at byte {self.frame_end}", f"another frame at byte {self.position - 9}"
            )
        if self.position + length > self.size:
            raise RefusedPickleError(
                f"at least {self.position + length} bytes", f"{self.size} bytes (truncated)", _DOWNLOAD_AGAIN
            )
        self.frame_end = self.position + length if length else None


# The values on the stack: int, bool, None, str, tuple, and these.


@dataclass(frozen=True)
class _Payload:
    """Bytes in the file. `first` is the byte itself if there is only one: numpy's placeholder b"b"."""

    offset: int
    length: int
    first: bytes


@dataclass(eq=False)
class _Dtype:
    code: str
    built: bool = False


@dataclass(eq=False)
class _Quantized:
    weight: ArrayPlace | None = None
    scales: ArrayPlace | None = None


@dataclass(eq=False)
class _Dict:
    items: dict[str, Any] = field(default_factory=dict)


_MARK = object()


def _is(value: Any, expected: Any) -> bool:
    """Equality that distinguishes False from 0. Recurses no deeper than `expected`, so deep nesting is no attack."""
    if type(value) is not type(expected):
        return False
    if isinstance(expected, tuple):
        return len(value) == len(expected) and all(_is(a, b) for a, b in zip(value, expected, strict=True))
    return bool(value == expected)


class _Walker:
    """Executes the opcodes of one file on values that only describe what pickle would have made."""

    def __init__(self, cursor: _Cursor):
        self.cursor = cursor
        self.stack: list[Any] = []
        self.memo: list[Any] = []

    def run(self) -> tuple[ArrayPlace, ArrayPlace | None]:
        """Returns weight and scales. Raises RefusedPickleError."""
        take = self.cursor.take
        protocol = take(2)[1]
        if protocol not in (4, 5):
            self.wrong_protocol(protocol)
        for _ in range(_MAX_OPCODES):
            at = self.cursor.position
            opcode = take(1)
            if opcode == b".":  # STOP
                break
            operation = self.OPERATIONS.get(opcode)
            if operation is None:
                self.refuse_opcode(opcode, at)
            operation(self)
        else:
            raise RefusedPickleError(f"at most {_MAX_OPCODES} opcodes", "more")
        if protocol != 4:
            raise RefusedPickleError("a pickle of protocol 4", f"protocol {protocol}")
        if self.cursor.position != self.cursor.size:
            raise RefusedPickleError(
                f"{self.cursor.position} bytes", f"{self.cursor.size} bytes (over-long: bytes follow the tensor)"
            )
        if self.cursor.frame_end is not None:
            raise RefusedPickleError(f"the frame to end at byte {self.cursor.frame_end}", "the end of the file")
        result = self.pop()
        if self.stack:
            raise RefusedPickleError("one object", f"{len(self.stack) + 1} objects")
        return self.tensor(result)

    @staticmethod
    def tensor(result: Any) -> tuple[ArrayPlace, ArrayPlace | None]:
        if isinstance(result, ArrayPlace) and result.dtype:
            if result.dtype != "float32":
                raise RefusedPickleError(
                    "a float32 array, or int8 with scales", f"a {result.dtype} array without scales"
                )
            return result, None
        if not isinstance(result, _Quantized) or result.weight is None or result.scales is None:
            raise RefusedPickleError("an array or a QuantizedWeight8bit", "another object")
        weight, scales = result.weight, result.scales
        if (weight.dtype, scales.dtype) != ("int8", "bfloat16"):
            raise RefusedPickleError("an int8 weight with bfloat16 scales", f"{weight.dtype} with {scales.dtype}")
        w, s = weight.shape, scales.shape
        if len(w) < 2 or len(s) != len(w) or s[:-2] != w[:-2] or s[-1] != w[-1] or w[-2] % s[-2]:
            raise RefusedPickleError(
                "scales (..., G, N) for a weight (..., K, N), K a multiple of G", f"scales {s} for a weight {w}"
            )
        return weight, scales

    def wrong_protocol(self, protocol: int) -> NoReturn:
        _refuse_text_global(self.cursor.read_at(0, _WINDOW))
        raise RefusedPickleError("a pickle of protocol 4", f"protocol {protocol}")

    def refuse_opcode(self, opcode: bytes, at: int) -> NoReturn:
        if opcode == b"\0":
            raise RefusedPickleError(
                "an opcode", f"zero bytes from byte {at} on (an unfinished download)", _DOWNLOAD_AGAIN
            )
        if opcode in (b"c", b"i"):  # GLOBAL, INST: two lines of text
            _refuse_text_global(self.cursor.read_at(at, _WINDOW))
        name = _OPCODE_NAMES.get(opcode.decode("latin1"), f"0x{opcode.hex()}")
        raise RefusedPickleError("only the opcodes of a numpy array", f"opcode {name} at byte {at}", _NEVER_UNPICKLE)

    # -- stack and memo

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise RefusedPickleError("an object on the stack", "none")
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        for position in reversed(range(len(self.stack))):
            if self.stack[position] is _MARK:
                values = self.stack[position + 1 :]
                del self.stack[position:]
                return values
        raise RefusedPickleError("a mark on the stack", "none")

    def memoize(self) -> None:
        self.memo.append(self.pop())
        self.push(self.memo[-1])

    def get(self, index: int) -> None:
        if index >= len(self.memo):
            raise RefusedPickleError(
                f"a reference to one of {len(self.memo)} objects", f"a reference to object {index}"
            )
        self.push(self.memo[index])

    # -- atoms

    def number(self, format: str) -> int:
        return int(struct.unpack(format, self.cursor.take(struct.calcsize(format)))[0])

    def text(self) -> None:
        raw = self.cursor.take(self.number("<B"))
        try:
            self.push(raw.decode("utf-8"))
        except UnicodeDecodeError:
            raise RefusedPickleError("text in UTF-8", repr(raw)) from None

    def payload(self, length_format: str) -> None:
        length = self.number(length_format)
        first = self.cursor.take(1) if length == 1 else b""
        offset = self.cursor.position - 1 if length == 1 else self.cursor.skip(length)
        self.push(_Payload(offset, length, first))

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    # -- objects

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedPickleError("the name of a global", "another object")
        found = _Global(module, name)
        if found not in _GLOBALS:
            _refuse_global(found)
        self.push(found)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if _is(function, _RECONSTRUCT):
            if (
                type(arguments) is not tuple
                or len(arguments) != 3
                or not _is(arguments[:2], (_NDARRAY, (0,)))
                or not isinstance(arguments[2], _Payload)
                or arguments[2].first != b"b"
            ):
                raise RefusedPickleError("_reconstruct(ndarray, (0,), b'b')", "other arguments")
            self.push(ArrayPlace())
        elif _is(function, _DTYPE):
            if type(arguments) is not tuple or len(arguments) != 3 or not _is(arguments[1:], (False, True)):
                raise RefusedPickleError("dtype(name, False, True)", "other arguments")
            self.push(_Dtype(self.dtype_code(arguments[0])))
        else:
            raise RefusedPickleError("a call of _reconstruct or dtype", "a call of something else")

    @staticmethod
    def dtype_code(code: Any) -> str:
        known = {"f4": "float32", "i1": "int8"}
        if _is(code, _BFLOAT16):
            return "bfloat16"
        if type(code) is str and code in known:
            return known[code]
        if type(code) is str and code.startswith("O"):
            raise RefusedPickleError("dtype float32, int8 or bfloat16", "an array of Python objects", _NEVER_UNPICKLE)
        raise RefusedPickleError(
            "dtype float32, int8 or bfloat16", repr(code) if type(code) is str else "something else"
        )

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if not _is(cls, _QUANTIZED) or not _is(arguments, ()):
            raise RefusedPickleError("QuantizedWeight8bit()", "another new object, or arguments")
        self.push(_Quantized())

    def set_items(self, values: Sequence[Any]) -> None:
        target = self.pop()
        if not isinstance(target, _Dict) or len(values) % 2:
            raise RefusedPickleError("a dict of weight and scales", "another object")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) is not str or key not in ("weight", "scales") or key in target.items:
                raise RefusedPickleError("a dict of weight and scales", "another key, or one twice")
            target.items[key] = value
        self.push(target)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if isinstance(target, ArrayPlace):
            self.build_array(target, state)
        elif isinstance(target, _Dtype):
            self.build_dtype(target, state)
        elif isinstance(target, _Quantized):
            if not isinstance(state, _Dict) or target.weight is not None:
                raise RefusedPickleError("a dict of weight and scales", "another state")
            weight, scales = state.items.get("weight"), state.items.get("scales")
            for part in (weight, scales):
                if not isinstance(part, ArrayPlace) or not part.dtype:
                    raise RefusedPickleError("arrays as weight and scales", "another object, or none")
            target.weight, target.scales = weight, scales
        else:
            raise RefusedPickleError("the state of an array, dtype or QuantizedWeight8bit", "another object")
        self.push(target)

    @staticmethod
    def build_dtype(dtype: _Dtype, state: Any) -> None:
        if dtype.built or type(state) is not tuple or len(state) != 8:
            raise RefusedPickleError("the state of a dtype", "another state")
        order = state[1]
        if order == ">":
            raise RefusedPickleError("little-endian numbers", "big-endian numbers")
        # The last number holds flags of the writer's ml_dtypes version; for the types of numpy it is 0.
        expected: tuple[Any, ...]
        if dtype.code == "bfloat16":
            flags = state[7] if type(state[7]) is int else 0
            expected = (3, "<", None, None, None, 2, 2, flags)
        else:
            expected = (3, "|" if dtype.code == "int8" else "<", None, None, None, -1, -1, 0)
        if not _is(state, expected):
            raise RefusedPickleError(f"a plain {dtype.code} dtype", "a structured, aligned or otherwise different one")
        dtype.built = True

    @staticmethod
    def build_array(array: ArrayPlace, state: Any) -> None:
        if array.dtype or type(state) is not tuple or len(state) != 5 or not _is(state[0], 1):
            raise RefusedPickleError("the state of an array (version 1, shape, dtype, order, bytes)", "another state")
        _, shape, dtype, fortran, payload = state
        if not isinstance(dtype, _Dtype) or not dtype.built:
            raise RefusedPickleError("the dtype of an array", "another object")
        if fortran is True:
            raise RefusedPickleError("an array in C order", "an array in Fortran order")
        if fortran is not False or not isinstance(payload, _Payload):
            raise RefusedPickleError("the bytes of an array in C order", "another object")
        if type(shape) is not tuple or not 1 <= len(shape) <= 4:
            raise RefusedPickleError("a shape of 1 to 4 sizes", "another shape")
        if not all(type(size) is int and size > 0 for size in shape):
            raise RefusedPickleError("a shape of positive sizes", "another size")
        nbytes = math.prod(shape) * ITEMSIZE[dtype.code]
        if payload.length != nbytes:
            raise RefusedPickleError(f"{nbytes} bytes for {dtype.code} {shape}", f"{payload.length} bytes")
        array.dtype, array.shape, array.offset = dtype.code, shape, payload.offset

    OPERATIONS: ClassVar[dict[bytes, Callable[[_Walker], None]]] = {
        b"\x95": lambda self: self.cursor.begin_frame(self.number("<Q")),  # FRAME
        b"\x8c": text,  # SHORT_BINUNICODE
        b"C": lambda self: self.payload("<B"),  # SHORT_BINBYTES
        b"B": lambda self: self.payload("<I"),  # BINBYTES
        b"\x8e": lambda self: self.payload("<Q"),  # BINBYTES8
        b"K": lambda self: self.push(self.number("<B")),  # BININT1
        b"M": lambda self: self.push(self.number("<H")),  # BININT2
        b"J": lambda self: self.push(self.number("<i")),  # BININT
        b"N": lambda self: self.push(None),  # NONE
        b"\x88": lambda self: self.push(True),  # NEWTRUE
        b"\x89": lambda self: self.push(False),  # NEWFALSE
        b")": lambda self: self.push(()),  # EMPTY_TUPLE
        b"\x85": lambda self: self.tuple_of(1),  # TUPLE1
        b"\x86": lambda self: self.tuple_of(2),  # TUPLE2
        b"\x87": lambda self: self.tuple_of(3),  # TUPLE3
        b"(": lambda self: self.push(_MARK),  # MARK
        b"t": lambda self: self.push(tuple(self.pop_mark())),  # TUPLE
        b"}": lambda self: self.push(_Dict()),  # EMPTY_DICT
        b"s": set_item,  # SETITEM
        b"u": lambda self: self.set_items(self.pop_mark()),  # SETITEMS
        b"\x94": memoize,  # MEMOIZE
        b"h": lambda self: self.get(self.number("<B")),  # BINGET
        b"j": lambda self: self.get(self.number("<I")),  # LONG_BINGET
        b"\x93": stack_global,  # STACK_GLOBAL
        b"R": reduce,  # REDUCE
        b"\x81": new_object,  # NEWOBJ
        b"b": build,  # BUILD
    }
