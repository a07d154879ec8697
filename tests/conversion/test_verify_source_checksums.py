"""`grok1 verify SRC` finds any wrong byte of the released files, and reads no file twice for nothing."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner
from xai_files import tensor_files

from grok1.cli.verify import verify_command
from grok1.conversion import verify_source as module
from grok1.conversion.names import checkpoint_entries
from grok1.conversion.release import ReleaseFile
from grok1.conversion.verify_source import STATE_NAME, verify_source
from grok1.errors import CheckpointError, ConversionError


@pytest.fixture
def source(golden, tmp_path):
    folder = tmp_path / "src" / "ckpt-0"
    folder.mkdir(parents=True)
    for path in tensor_files(golden / "tiny-1" / "ckpt-0"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def table(golden):
    """As if tiny-1 had been published."""
    config = SimpleNamespace(**json.loads((golden / "tiny-1" / "config.json").read_text()))
    files = []
    for entry in checkpoint_entries(config):
        data = (golden / "tiny-1" / "ckpt-0" / entry.file).read_bytes()
        files.append(ReleaseFile(entry, len(data), hashlib.sha256(data).hexdigest()))
    return files


def test_a_sound_checkpoint_is_right_and_progress_counts_its_bytes(source, table):
    seen = []
    found = verify_source(source.parent, release=table, jobs=4, progress=lambda *counts: seen.append(counts))
    total = sum(file.size for file in table)
    assert (found.is_whole, found.right, found.nbytes, found.remembered) == (True, 38, total, 0)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_any_flipped_bit_is_found(source, table):
    rng = np.random.default_rng(0)
    for _ in range(30):
        path = source / table[rng.integers(38)].entry.file
        data = bytearray(path.read_bytes())
        at = int(rng.integers(len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        sound = path.read_bytes()
        path.write_bytes(data)
        found = verify_source(source, release=table)
        assert [line.split(":")[0] for line in found.problems] == [path.name]
        assert f"found {hashlib.sha256(data).hexdigest()}" in found.problems[0]
        assert found.right == 37
        path.write_bytes(sound)
    assert verify_source(source, release=table).is_whole


def test_wrong_sizes_missing_and_unknown_files_are_told_together(source, table):
    (source / "tensor00005_000").unlink()
    os.truncate(source / "tensor00006_000", 100)
    (source / "tensor00038_000").write_bytes(b"x")
    (source / "extra").write_bytes(b"x")
    found = verify_source(source, release=table)
    assert found.missing == ["tensor00005_000"]
    assert found.problems == [
        "extra: expected only tensorNNNNN_000, found an unknown file",
        f"tensor00006_000: expected {table[6].size} bytes, found 100",
        "tensor00038_000: expected 38 files, the last tensor00037_000, found one more",
    ]
    assert (found.right, found.is_whole) == (36, False)


def test_a_file_is_read_again_only_if_its_size_or_time_changed(source, table, monkeypatch):
    read = []
    checksum = module._Checker.checksum
    monkeypatch.setattr(module._Checker, "checksum", lambda self, path: read.append(path.name) or checksum(self, path))
    verify_source(source, release=table)
    assert len(read) == 38
    read.clear()
    found = verify_source(source, release=table)
    assert (read, found.remembered, found.right) == ([], 38, 38)
    os.utime(source / "tensor00007_000", ns=(1, 1))
    found = verify_source(source, release=table)
    assert (read, found.remembered, found.right) == (["tensor00007_000"], 37, 38)
    # A wrong file is remembered as wrong, and compared with whatever is published.
    read.clear()
    table[9] = dataclasses.replace(table[9], sha256="0" * 64)
    found = verify_source(source, release=table)
    assert (read, found.right, len(found.problems)) == ([], 37, 1)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": []}', '{"files": {"tensor00000_000": [1, 2]}}'])
def test_a_damaged_state_is_forgotten(source, table, text):
    (source / STATE_NAME).write_text(text)
    assert verify_source(source, release=table).is_whole


def test_an_interrupted_run_goes_on_where_it_was(source, table, monkeypatch):
    checksum, done = module._Checker.checksum, []

    def broken(self, path):
        if len(done) == 10:
            raise RuntimeError("power cut")
        done.append(path.name)
        return checksum(self, path)

    monkeypatch.setattr(module._Checker, "checksum", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        verify_source(source, release=table, jobs=1)
    monkeypatch.setattr(module._Checker, "checksum", checksum)
    found = verify_source(source, release=table)
    assert (found.remembered, found.right) == (10, 38)


def test_control_c_says_that_the_same_command_goes_on(source, table, monkeypatch):
    def interrupted(futures, return_when):
        futures[4].result()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt, match="run the same command again to resume"):
        verify_source(source, release=table, jobs=1)
    monkeypatch.undo()
    found = verify_source(source, release=table)
    assert found.remembered >= 5
    assert found.is_whole


def test_a_killed_run_goes_on_where_it_was(source, table, monkeypatch):
    checksum = module._Checker.checksum
    with monkeypatch.context() as patch:
        patch.setattr(module._Checker, "checksum", lambda self, path: (time.sleep(0.05), checksum(self, path))[1])
        patch.setattr(module, "STATE_SECONDS", 0)
        run = multiprocessing.get_context("fork").Process(
            target=verify_source, args=(source,), kwargs={"release": table, "jobs": 1}
        )
        run.start()
    state = source / STATE_NAME
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not state.exists() or len(json.loads(state.read_text())["files"]) < 3):
        time.sleep(0.01)
    run.kill()
    run.join()
    remembered = len(json.loads(state.read_text())["files"])
    assert 3 <= remembered < 38
    found = verify_source(source, release=table)
    assert (found.remembered, found.right, found.is_whole) == (remembered, 38, True)


def test_a_read_only_source_is_remembered_elsewhere(source, table, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != source and access(path, mode))
    found = verify_source(source, release=table)
    assert found.state.parent == tmp_path / "cache" / "grok1"
    assert not (source / STATE_NAME).exists()
    assert verify_source(source, release=table).remembered == 38
    named = verify_source(source, release=table, state=tmp_path / "deep" / "state.json")
    assert (named.state, named.remembered) == (tmp_path / "deep" / "state.json", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"cannot be written.*\n.*\n.*--state"):
        verify_source(source, release=table, state=tmp_path / "file" / "state.json")


def test_a_file_that_changes_while_it_is_read_is_told(source, table, monkeypatch):
    checksum = module._Checker.checksum

    def changing(self, path):
        result = checksum(self, path)
        if path.name == "tensor00004_000":
            os.utime(path, ns=(5, 5))
        return result

    monkeypatch.setattr(module._Checker, "checksum", changing)
    found = verify_source(source, release=table)
    assert found.problems == [
        "tensor00004_000: expected a file that does not change, found one that changed while it was read"
    ]


def test_another_checkpoint_has_no_published_checksums(source):
    with pytest.raises(CheckpointError, match="Checksums were published for the release only"):
        verify_source(source)
    assert not (source / STATE_NAME).exists()


def test_the_true_small_files_are_as_published(assets, tmp_path):
    found = verify_source(assets / "small-files", state=tmp_path / "state.json")
    assert (found.right, found.problems, len(found.missing)) == (321, [], 449)
    assert found.nbytes == sum(path.stat().st_size for path in tensor_files(assets / "small-files"))


def test_the_command_tells_by_its_exit_code(source, table, monkeypatch):
    app = typer.Typer()
    app.command()(verify_command)
    monkeypatch.setattr(module, "release_files", lambda: tuple(table))
    sound = CliRunner().invoke(app, [str(source)])
    assert sound.exit_code == 0
    assert "38 files match the published sums" in sound.output
    os.truncate(source / "tensor00006_000", 100)
    wrong = CliRunner().invoke(app, [str(source), "--jobs", "2", "--json"])
    assert wrong.exit_code == 1
    values = json.loads(wrong.output)
    assert (values["right"], values["remembered"], values["is_whole"]) == (37, 37, False)
    text = CliRunner().invoke(app, [str(source)])
    assert f"tensor00006_000: expected {table[6].size} bytes, found 100" in text.output
    assert "1 do not match, 0 are missing" in text.output
    both = CliRunner().invoke(app, [str(source), "--against", str(source), "--state", "x"])
    assert both.exit_code == 2
