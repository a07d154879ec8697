"""A conversion to GGUF that was killed or had no disk resumes, and its files equal those of a single run."""

import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest
from convert_children import Children
from random_checkpoint import write_random_checkpoint

from grok1.conversion.convert import convert
from grok1.errors import ConversionError


pytest.importorskip("gguf")
SETTINGS = {"layout": "gguf", "dtype": "int8", "max_shard_size": "400KB", "no_tokenizer": True, "jobs": 2}


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "random")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(source, out, **SETTINGS)
    return contents(out)


def check_unfinished(out: Path, expected: dict[str, str]) -> None:
    """Whatever was left: files under their final name are right."""
    found = contents(out) if out.exists() else {}
    finished = {name: digest for name, digest in found.items() if name in expected}
    assert finished.items() <= expected.items()


def test_killed_at_any_change_of_the_disk(source, expected, tmp_path, tmp_path_factory):
    children = Children(tmp_path_factory.mktemp("children"))
    try:
        calls = children.run(source=source, out=tmp_path / "counted", **SETTINGS).result()["calls"]
        points = [*range(2, 6), *range(6, calls - 8, calls // 8), *range(calls - 8, calls + 1, 2)]
        killed = 0
        for point in points:
            out = tmp_path / f"killed-{point}"
            killed += children.start(die_at=point, source=source, out=out, **SETTINGS).wait() == -signal.SIGKILL
            check_unfinished(out, expected)
            children.run(source=source, out=out, **SETTINGS)
            assert contents(out) == expected, f"killed at call {point} of {calls}"
        assert killed >= len(points) - 3
    finally:
        children.close()


@pytest.mark.parametrize("writes", [0, 1, 60])
def test_a_full_disk(source, expected, tmp_path, monkeypatch, writes):
    real, count = os.pwrite, 0

    def pwrite(descriptor, data, offset):
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(ConversionError, match="disk is full"):
            convert(source, out, **SETTINGS)
    check_unfinished(out, expected)
    assert not list(out.glob("*.partial"))
    convert(source, out, **SETTINGS)
    assert contents(out) == expected


def test_other_settings_are_refused_and_a_finished_run_returns_at_once(source, expected, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt, **SETTINGS)
    with pytest.raises(ConversionError, match="embedding: the unfinished conversion there has None, this one 'q8_0'"):
        convert(source, out, embedding="q8_0", **SETTINGS)
    convert(source, out, **SETTINGS)
    assert contents(out) == expected
    assert convert(source, out, **SETTINGS).is_finished
    with pytest.raises(ConversionError, match="another finished conversion"):
        convert(source, out, **{**SETTINGS, "dtype": "bfloat16"})
    assert contents(out) == expected
