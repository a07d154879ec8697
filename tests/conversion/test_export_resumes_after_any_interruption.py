"""Killed, interrupted or out of disk: the next `export-xai` resumes, and gives the files and the report of one run."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grok1.conversion.convert import convert
from grok1.conversion.export_xai import export_xai
from grok1.errors import CheckpointError, ConversionError


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(golden / "tiny-1", out, no_tokenizer=True, max_shard_size="300KB")
    return out


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    return export_xai(folder, out, scale_blocks=1), contents(out)


def resume(folder: Path, out: Path, expected) -> None:
    report, files = expected
    resumed = export_xai(folder, out, scale_blocks=1)
    assert contents(out) == files
    if not resumed.is_finished:
        assert (resumed.files, resumed.nbytes, resumed.exact) == (report.files, report.nbytes, report.exact)
        assert resumed.widened == report.widened
        assert resumed.losses.keys() == report.losses.keys()
        for kind, loss in report.losses.items():
            assert resumed.losses[kind].files == loss.files
            assert resumed.losses[kind].mean == pytest.approx(loss.mean, rel=1e-12)
            assert resumed.losses[kind].largest == loss.largest


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_an_interruption_from_the_keyboard(folder, expected, tmp_path, share):
    def interrupt(done, total):
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_xai(folder, tmp_path / "out", scale_blocks=1, progress=interrupt)
    assert not (tmp_path / "out" / "ckpt-0").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "ckpt-0.partial").iterdir()}
    resume(folder, tmp_path / "out", expected)
    again = {name: (tmp_path / "out" / "ckpt-0" / name).stat().st_mtime_ns for name in finished}
    assert finished and sum(finished[name] == again[name] for name in finished) >= len(finished) - 1


SCRIPT = """
import os, signal, sys
count, calls = int(sys.argv[3]), 0
def counted(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
from grok1.conversion.export_xai import export_xai
for name in ("fsync", "replace", "unlink", "mkdir"):
    setattr(os, name, counted(getattr(os, name)))
export_xai(sys.argv[1], sys.argv[2], scale_blocks=1)
print(calls)
"""


def test_killed_at_changes_of_the_disk(folder, expected, tmp_path):
    def run(name: str, count: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / name), str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    calls = int(run("counted", 0).stdout)
    assert calls > 100
    for count in (2, calls // 2, calls - 4, calls - 2, calls - 1):
        assert run(f"killed-{count}", count).returncode == -signal.SIGKILL
        resume(folder, tmp_path / f"killed-{count}", expected)


@pytest.mark.parametrize("writes", [1, 40])
def test_a_full_disk(folder, expected, tmp_path, monkeypatch, writes):
    real, count = os.fsync, 0

    def fsync(descriptor):
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(ConversionError, match="disk is full"):
            export_xai(folder, tmp_path / "out", scale_blocks=1)
    resume(folder, tmp_path / "out", expected)


def test_other_settings_and_sources_are_refused_by_name(golden, folder, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_xai(folder, tmp_path / "out", scale_blocks=1, progress=interrupt)
    with pytest.raises(ConversionError, match="scale_blocks: the unfinished conversion there has 1, this one 8"):
        export_xai(folder, tmp_path / "out", scale_blocks=8)
    convert(golden / "tiny-1", tmp_path / "other", no_tokenizer=True, max_shard_size="300KB")
    with pytest.raises(ConversionError, match="source model-00001-of-"):
        export_xai(tmp_path / "other", tmp_path / "out", scale_blocks=1)


def test_a_folder_that_changes_meanwhile_is_refused(golden, tmp_path):
    folder, out = tmp_path / "folder", tmp_path / "out"
    convert(golden / "tiny-1", folder, no_tokenizer=True, max_shard_size="300KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    before = victim.stat()

    def change(done, total):
        if victim.stat().st_ino == before.st_ino:
            (tmp_path / "new").write_bytes(victim.read_bytes())
            os.utime(tmp_path / "new", ns=(0, before.st_mtime_ns))
            (tmp_path / "new").rename(victim)

    with pytest.raises(CheckpointError, match=f"{victim.name}: changed while it was being read"):
        export_xai(folder, out, scale_blocks=1, progress=change)
    assert not (out / "ckpt-0").exists()


def test_two_runs_exclude_each_other(folder, expected, tmp_path):
    errors = []

    def start_another(done, total):
        if not errors:
            try:
                export_xai(folder, tmp_path / "out", scale_blocks=1)
            except ConversionError as error:
                errors.append(str(error))

    export_xai(folder, tmp_path / "out", scale_blocks=1, progress=start_another)
    assert "another conversion is writing there" in errors[0]
    assert contents(tmp_path / "out") == expected[1]
