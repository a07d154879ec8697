"""Files, as every tool reads and writes them: one atomic write, one checksum, one reader of safetensors headers.

Nothing here imports torch, numpy or Transformers.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from grok1.errors import ConversionError


# Every file has this suffix until all of its bytes are on the disk.
PARTIAL_SUFFIX = ".partial"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUMS_NAME = "SHA256SUMS"
# The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
# The release has 2,115 tensors, in int8 3,906. The JSON of many more takes gigabytes to parse.
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
SUMS_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")
# https://github.com/huggingface/safetensors#format: its dtypes, their names in torch, and the bytes of one number.
# fmt: off
_DTYPES = (
    ("F64", "float64", 8), ("F32", "float32", 4), ("F16", "float16", 2), ("BF16", "bfloat16", 2),
    ("I64", "int64", 8), ("I32", "int32", 4), ("I16", "int16", 2), ("I8", "int8", 1), ("BOOL", "bool", 1),
    ("U64", "uint64", 8), ("U32", "uint32", 4), ("U16", "uint16", 2), ("U8", "uint8", 1), ("C64", "complex64", 8),
    ("F8_E4M3", "float8_e4m3fn", 1), ("F8_E5M2", "float8_e5m2", 1),
)
# fmt: on
TORCH_NAME = {code: name for code, name, _ in _DTYPES}
SAFETENSORS_NAME = {name: code for code, name, _ in _DTYPES}
ITEMSIZE = {name: size for _, name, size in _DTYPES}
# The blocks of GGUF: bytes of 32 values with their scale in float16 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
BLOCK_SIZE = 32
BLOCK_BYTES = {"q8_0": 34, "q4_0": 18}
# The dtypes of Grok-1's folders.
GROK_DTYPES = ("float32", "bfloat16", "int8", "int32", "int64")
HASH_BLOCK_BYTES = 4 * 2**20
# The largest JSON file of the release is the tokenizer's, 8 MB.
MAX_JSON_BYTES = 64 * 2**20
# Flags of os.open that some systems lack.
BINARY = getattr(os, "O_BINARY", 0)
NONBLOCK = getattr(os, "O_NONBLOCK", 0)

# Called with (bytes done, bytes in all), from any thread.
Progress = Callable[[int, int], None]


def array_bytes(dtype: str, numel: int) -> int:
    """Bytes of so many numbers, of a dtype as torch spells it or of a block type, whose blocks are whole."""
    return numel // BLOCK_SIZE * BLOCK_BYTES[dtype] if dtype in BLOCK_BYTES else numel * ITEMSIZE[dtype]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def atomic_write(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` when the block ends: complete, on the disk, or not at all.

    The bytes go to a temporary name in the same folder (`PARTIAL_SUFFIX`), are synchronised and renamed. A file that
    is there is replaced. If the block raises, the temporary file is removed and `path` is as it was.

    Args:
        needed: bytes that will be written, for the message on a full disk.

    Raises:
        ConversionError: the folder cannot be written or the disk is full. Other errors of the block are passed on.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        file: BinaryIO = partial.open("wb")
    except OSError as error:
        raise unwritable(path, error, needed=needed) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # the first error says more
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
            raise unwritable(path, error, needed=needed) from error
        raise


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a small file at once (`atomic_write`); text as UTF-8 with line feeds."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_write(path, len(data)) as file:
        file.write(data)


WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)})


def unwritable(
    place: str | os.PathLike[str],
    error: OSError,
    next_step: str = "Run the command again.",
    needed: int | None = None,
) -> ConversionError:
    """The error for a file or folder that cannot be written, with the free space where the disk is full."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        free = f"{free_bytes(Path(place)):,} bytes are free there"
        free = free if needed is None else f"{needed:,} bytes are needed, {free}"
        return ConversionError(f"{place}: the disk is full", [f"{error}; {free}"], f"Free some space. {next_step}")
    return ConversionError(f"{place}: cannot be written", [str(error)], next_step)


def free_bytes(place: Path) -> int:
    """Free bytes of the disk that holds `place`, or will hold it; 0 if that cannot be found out."""
    place = place.absolute()
    existing = next((folder for folder in (place, *place.parents) if folder.is_dir()), None)
    try:
        return 0 if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return 0


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, on systems that can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and writing at a position, from several threads. Windows has neither preadv nor pwrite.

_seek_lock = threading.Lock()


def read_into(descriptor: int, view: memoryview, offset: int) -> int:
    """Fills `view` with the bytes from `offset` on; returns how many there were before the file ended."""
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [view[done:]], offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                block = os.read(descriptor, min(len(view) - done, HASH_BLOCK_BYTES))
            count = len(block)
            view[done : done + count] = block
        if count == 0:
            break
        done += count
    return done


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes from `offset` on; fewer if the file ends before."""
    data = bytearray(count)
    return bytes(data[: read_into(descriptor, memoryview(data), offset)])


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all bytes of `data` at a position of a file."""
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(descriptor, data[done:], offset + done)
        else:
            with _seek_lock:
                os.lseek(descriptor, offset + done, os.SEEK_SET)
                done += os.write(descriptor, data[done:])


# ---------------------------------------------------------------------------------------------------------------------
# Checksums, and whether a file is still the same


class FileState(NamedTuple):
    """What shows that a file changed: none of the four can stay when its bytes are replaced or rewritten."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int

    @property
    def lasting(self) -> list[int]:
        """What stays when a file is renamed or its permissions change, as JSON values: all but the time of change."""
        return [self.size, self.mtime_ns, self.inode]

    @classmethod
    def of(cls, file: str | os.PathLike[str] | int) -> FileState:
        """The state of a path or an open descriptor. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns)


def sha256_of(path: str | os.PathLike[str], advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file in lowercase hex, read in blocks.

    Args:
        advance: called with the bytes of each block that was read. What it raises ends the reading.
    """
    return hash_file(path, hashlib.sha256(), advance)


def hash_file(path: str | os.PathLike[str], digest: Any, advance: Callable[[int], None] | None = None) -> str:
    """As `sha256_of`, into a digest of hashlib that may hold bytes already."""
    buffer = memoryview(bytearray(HASH_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if advance is not None:
                advance(count)
    return str(digest.hexdigest())


def read_sums(path: Path) -> dict[str, str]:
    """SHA-256 in lowercase hex by file name, from a file that `sha256sum -c` reads.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is something else; what was expected and found.
    """
    sums = {}
    for number, line in enumerate(path.read_bytes().decode().removesuffix("\n").split("\n"), start=1):
        match = SUMS_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number}: expected a SHA-256 and a file name, found {line[:80]!r}")
        if match[2] in sums:
            raise ValueError(f"line {number}: expected one sum per file, found another one of {match[2]}")
        sums[match[2]] = match[1]
    return sums


def sums_text(sums: Mapping[str, str]) -> str:
    """The text of such a file, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def update_sums(folder: Path, *names: str) -> None:
    """Brings the sums of files that were written again up to date, in a folder that has a file of sums.

    Raises:
        ConversionError: the file of sums cannot be read or written.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return
    try:
        sums = read_sums(path) | {name: sha256_of(folder / name) for name in names}
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read", [str(error)], "Remove it, or convert again.") from error
    write_file(path, sums_text(sums))


# ---------------------------------------------------------------------------------------------------------------------
# Small files that somebody else wrote


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file to read. A named pipe is not waited for.

    Raises:
        ValueError: it is a folder, a pipe, a device or a loop of links.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | NONBLOCK | BINARY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("expected a file, found a loop of links") from None
        if error.errno == errno.ENXIO:
            raise ValueError("expected a regular file, found a socket or device") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("expected a regular file, found a folder, pipe or device")
    return open(descriptor, "rb")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file of at most MAX_JSON_BYTES.

    Raises:
        ValueError: what was expected and found, without the name of the file.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"expected at most {MAX_JSON_BYTES:,} bytes of JSON, found more")
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("expected a JSON object, found one that is too deep") from None
    except ValueError as error:
        raise ValueError(f"expected a JSON object, found something else ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found a {type(found).__name__}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Safetensors headers


class StoredTensor(NamedTuple):
    """Where a tensor lies: `nbytes` bytes from `offset` on in `file`; `dtype` as torch spells it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_safetensors_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by its name. Only the header is read.

    The header is bounded, its offsets are compared with dtypes, shapes and the size of the file: a file that is cut
    off, over-long, or whose tensors overlap is refused.

    Raises:
        ValueError: what was expected and found, without the name of the file.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"expected a safetensors header in the file, found one of {length} bytes in {size}")
        text = file.read(length)
        if (count := text.count(b'"data_offsets"')) > MAX_TENSORS:
            raise ValueError(f"expected at most {MAX_TENSORS:,} tensors, found {count:,}")
        try:
            header = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("expected a safetensors header in JSON, found something else") from None
    if not isinstance(header, dict):
        raise ValueError("expected a safetensors header, found something else")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, described, 8 + length) for name, described in header.items()}
    position = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            begin, found = position - 8 - length, tensor.offset - 8 - length
            raise ValueError(f"expected a tensor at byte {begin} of the data, found the next one at {found}")
        position += tensor.nbytes
    if size != position:
        raise ValueError(f"expected {position} bytes, found {size}")
    return tensors


def _stored(path: Path, name: str, described: Any, data: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = described["dtype"], tuple(described["shape"]), described["data_offsets"]
        sound = isinstance(code, str) and len(shape) <= MAX_DIMENSIONS
        sound = sound and all(type(value) is int and 0 <= value < 2**63 for value in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"expected dtype, shape and data_offsets of {name}, found something else")
    if code not in TORCH_NAME:
        raise ValueError(f"expected {name} as one of {', '.join(sorted(TORCH_NAME))}, found {code}")
    dtype = TORCH_NAME[code]
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise ValueError(f"expected {nbytes} bytes for {name} {code} {shape}, found {end - begin}")
    return StoredTensor(path, dtype, shape, data + begin, nbytes)


def read_model_folder(
    folder: str | os.PathLike[str], dtypes: Collection[str] = GROK_DTYPES
) -> dict[str, StoredTensor]:
    """Every tensor of a model's folder by its name: of the shards that its index names, or of model.safetensors.

    Args:
        dtypes: those that are expected, as torch spells them.

    Raises:
        ConversionError: with every problem: no weights, a shard that is missing, cut off or outside of the folder, a
            header that does not describe its file, another dtype, an index that disagrees.
    """
    folder = Path(folder)
    weight_map = read_index(folder)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())) if weight_map else [SINGLE_NAME]:
        try:
            found = read_safetensors_header(_file_of(folder, shard))
        except (ValueError, OSError) as error:
            problems.append(f"{shard}: {error}")
            continue
        problems += [
            f"{shard}: expected {name} as one of {', '.join(dtypes)}, found {tensor.dtype}"
            for name, tensor in found.items()
            if tensor.dtype not in dtypes
        ]
        problems += [f"{name}: expected in one shard, found in {shard} too" for name in tensors.keys() & found.keys()]
        tensors |= found
    if weight_map and not problems:
        problems += [f"{name}: expected in {weight_map[name]}, found nowhere" for name in weight_map.keys() - tensors]
        problems += [
            f"{name}: expected in {INDEX_NAME}, found only in a shard" for name in tensors.keys() - weight_map
        ]
        problems += [
            f"{name}: expected in {weight_map[name]}, found in {tensors[name].file.name}"
            for name in tensors.keys() & weight_map.keys()
            if tensors[name].file.name != weight_map[name]
        ]
    if problems:
        raise ConversionError(f"{folder}: its weights cannot be read", sorted(problems))
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """The weight map of a folder's index: file by tensor. Empty where the folder has one file, model.safetensors.

    Raises:
        ConversionError: there is neither, or the index is none.
    """
    path = folder / INDEX_NAME
    if not os.path.lexists(path):
        if os.path.lexists(folder / SINGLE_NAME):
            return {}
        raise ConversionError(
            f"{folder}: no weights", [f"expected {INDEX_NAME} or {SINGLE_NAME} in {folder}, found neither"]
        )
    try:
        weight_map = read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"{path}: expected an index with a weight_map, found none ({error})") from None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise ConversionError(f"{path}: expected a weight_map from tensors to files, found something else")
    return weight_map


def _file_of(folder: Path, name: str) -> Path:
    """A file that an index names. Raises ValueError if it is none of the folder's own."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of a file in the folder, found a path")
    try:
        outside = link_out_of(path)
    except RuntimeError:  # before Python 3.13, resolving a loop
        raise ValueError("expected a file, found a loop of links") from None
    if outside:
        raise ValueError(f"expected a file of the folder, found a link out of it, to {outside}")
    if not path.exists():
        raise ValueError("expected a file, found none")
    return path


def link_out_of(path: Path) -> Path | None:
    """Where a link leads if it leaves its folder, else None.

    A link may end in its own folder, or in the `blobs` beside the `snapshots` that hold it: the cache of the Hugging
    Face hub stores every file like that.
    """
    if not path.is_symlink():
        return None
    folder, target = path.parent.resolve(), path.resolve()
    allowed = [folder]
    allowed += [ancestor.parent / "blobs" for ancestor in folder.parents if ancestor.name == "snapshots"]
    return None if any(target.is_relative_to(root) for root in allowed) else target
