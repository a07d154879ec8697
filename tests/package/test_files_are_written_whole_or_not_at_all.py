"""grok1.files: the atomic write, the checksum, positional reads without preadv, and the watch of a file."""

import errno
import hashlib
import os
import threading

import pytest

from grok1 import files
from grok1.errors import ConversionError
from grok1.files import FileState, atomic_write, hash_file, read_at, sha256_of, write_at, write_file


def test_a_file_appears_whole_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    write_file(path, "häuser\n")
    assert path.read_bytes() == "häuser\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x"), OSError(errno.EIO, "reading failed")])
def test_a_failure_leaves_the_file_before(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(type(error)) as caught, atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_with_the_folder_and_what_is_free(tmp_path, monkeypatch, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "open":
        monkeypatch.setattr(type(tmp_path), "open", full)
    else:
        monkeypatch.setattr(os, step, full)
    with pytest.raises(ConversionError, match=r"file: the disk is full\n.*\d bytes are free there\nFree some space"):
        write_file(tmp_path / "file", b"x" * 100)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ConversionError, match="cannot be written"):
        write_file(tmp_path / "none" / "file", "x")


def test_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HASH_BLOCK_BYTES", 1000)
    data = os.urandom(4321)
    (tmp_path / "file").write_bytes(data)
    seen = []
    assert sha256_of(tmp_path / "file", seen.append) == hashlib.sha256(data).hexdigest()
    assert seen == [1000, 1000, 1000, 1000, 321]
    assert hash_file(tmp_path / "file", hashlib.sha1(b"blob")) == hashlib.sha1(b"blob" + data).hexdigest()


@pytest.mark.parametrize("system", ["linux", "windows"])
def test_positions_from_several_threads(tmp_path, monkeypatch, system):
    if system == "windows":
        for name in ("preadv", "pread", "pwrite"):
            monkeypatch.delattr(os, name)
    data = os.urandom(2**16)
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def write(number: int) -> None:
        for begin in range(number * 64, len(data), 8 * 64):
            write_at(descriptor, memoryview(data)[begin : begin + 64], begin)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == data
    assert read_at(descriptor, 100, 2**16 - 40) == data[-40:]
    assert read_at(descriptor, 64, 4096) == data[4096 : 4096 + 64]
    os.close(descriptor)


def test_a_file_that_was_replaced_or_rewritten_is_noticed_with_equal_size_and_time(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"aaaa")
    before = FileState.of(path)
    assert FileState.of(path) == before
    path.write_bytes(b"bbbb")
    os.utime(path, ns=(0, before.mtime_ns))
    rewritten = FileState.of(path)
    assert rewritten[:3] == before[:3] and rewritten != before
    (tmp_path / "other").write_bytes(b"cccc")
    os.utime(tmp_path / "other", ns=(0, before.mtime_ns))
    os.replace(tmp_path / "other", path)
    assert FileState.of(path).inode != before.inode
