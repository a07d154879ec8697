"""Killed, out of disk, robbed of its source: the next run goes on, and the folder is the one of a single run."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from convert_children import Children
from safetensors import safe_open

from grok1.conversion.convert import convert
from grok1.conversion.journal import JOURNAL_NAME, LOCK_NAME
from grok1.errors import CheckpointError, ConversionError
from grok1.files import PARTIAL_SUFFIX


SETTINGS = {"no_tokenizer": True, "max_shard_size": "120KB", "jobs": 2}
INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file and folder below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def source(golden, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny-1"
    shutil.copytree(golden / "tiny-1", folder)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(source, out, **SETTINGS)
    return contents(out)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    children = Children(tmp_path_factory.mktemp("children"))
    yield children
    children.close()


def check_unfinished(out: Path, expected: dict[str, str]) -> None:
    """Whatever was left: files under their final name are right, and without its journal the folder is whole."""
    if not out.exists():
        return
    found = contents(out)
    finished = {name: digest for name, digest in found.items() if name in expected}
    assert finished.items() <= expected.items()
    if INDEX in found:
        assert found.keys() >= expected.keys() - {INDEX}
    if found.keys() - {LOCK_NAME, JOURNAL_NAME + PARTIAL_SUFFIX} and JOURNAL_NAME not in found:
        assert found == expected  # killed before its record was written, a run has written nothing else


def test_killed_at_any_change_of_the_disk(source, expected, children, tmp_path):
    calls = children.run(source=source, out=tmp_path / "counted", **SETTINGS).result()["calls"]
    assert calls > 60
    # The beginning and the end, where the journal comes and goes, call by call; what is between in steps.
    points = [*range(1, 8), *range(8, calls - 10, calls // 14), *range(calls - 10, calls + 1)]
    killed = 0
    for point in points:
        out = tmp_path / f"killed-{point}"
        killed += children.start(die_at=point, source=source, out=out, **SETTINGS).wait() == -signal.SIGKILL
        check_unfinished(out, expected)
        if contents(out) != expected:
            children.run(source=source, out=out, **SETTINGS)
        assert contents(out) == expected, f"killed at call {point} of {calls}"
    # The number of calls varies by a few with the order of the threads.
    assert killed >= max(25, len(points) - 5)


def test_killed_at_random_moments_again_and_again(source, expected, children, tmp_path):
    moments, out = random.Random(0), tmp_path / "out"
    seconds, kills, begun = 1.0, 0, time.perf_counter()
    while kills < 20:
        child = children.start(source=source, out=out, **SETTINGS)
        time.sleep(moments.uniform(0, seconds))
        child.kill()
        if child.wait() == 0:
            # Too late: a run takes less than that. Begin again, and kill sooner.
            assert contents(out) == expected
            shutil.rmtree(out)
            seconds = max(0.05, seconds * 0.8)
        else:
            kills += 1
            check_unfinished(out, expected)
        assert time.perf_counter() - begun < 300
    if contents(out) != expected:
        children.run(source=source, out=out, **SETTINGS)
    assert contents(out) == expected


def fail_after(monkeypatch, writes: int, action) -> None:
    """Lets the converter write so many blocks, then does something before every further one."""
    real, count = os.pwrite, 0

    def pwrite(descriptor, data, offset):
        nonlocal count
        count += 1
        if count > writes:
            action()
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)


def raise_error(number: int):
    def action():
        raise OSError(number, os.strerror(number))

    return action


@pytest.mark.parametrize("writes", [0, 1, 30, 80])
def test_a_full_disk(source, expected, tmp_path, monkeypatch, writes):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_after(patch, writes, raise_error(errno.ENOSPC))
        with pytest.raises(ConversionError, match="disk is full") as error:
            convert(source, out, **SETTINGS)
    assert "run the same command again" in str(error.value)
    check_unfinished(out, expected)
    assert not list(out.glob("*.partial"))
    convert(source, out, **SETTINGS)
    assert contents(out) == expected


def test_a_limit_of_the_system_on_the_size_of_a_file(source, expected, children, tmp_path):
    child = children.start(file_limit=20_000, source=source, out=tmp_path / "out", **SETTINGS)
    assert child.wait() == 1
    assert "cannot be written" in child.result()["error"]
    check_unfinished(tmp_path / "out", expected)
    children.run(source=source, out=tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == expected


def test_an_interruption_from_the_keyboard(source, expected, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt, **SETTINGS)
    check_unfinished(tmp_path / "out", expected)
    assert list((tmp_path / "out").glob("*.safetensors"))
    convert(source, tmp_path / "out", **SETTINGS)
    assert contents(tmp_path / "out") == expected


def test_a_file_of_the_source_goes_away_and_comes_back(golden, expected, tmp_path, monkeypatch):
    source, out, away = tmp_path / "source", tmp_path / "out", tmp_path / "away"
    shutil.copytree(golden / "tiny-1", source)
    victim = source / "ckpt-0" / "tensor00029_000"
    with monkeypatch.context() as patch:
        fail_after(patch, 60, lambda: victim.exists() and victim.rename(away))
        with pytest.raises(CheckpointError, match="tensor00029_000"):
            convert(source, out, **SETTINGS)
    check_unfinished(out, expected)
    with pytest.raises(CheckpointError, match=r"tensor00029_000: expected .* found no such file"):
        convert(source, out, **SETTINGS)
    away.rename(victim)
    convert(source, out, **SETTINGS)
    assert contents(out) == expected


@pytest.mark.parametrize("change", ["touched", "truncated", "replaced"])
def test_a_source_that_changes_is_refused(golden, tmp_path, monkeypatch, change):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(golden / "tiny-1", source)
    victim = source / "ckpt-0" / "tensor00002_000"
    before = victim.stat()

    def action():
        if victim.stat().st_mtime_ns == before.st_mtime_ns and victim.stat().st_size == before.st_size:
            if change == "touched":
                os.utime(victim, ns=(0, before.st_mtime_ns + 1))
            elif change == "truncated":
                os.truncate(victim, before.st_size // 2)
            else:
                (tmp_path / "new").write_bytes(victim.read_bytes()[:-1] + b"x")
                (tmp_path / "new").rename(victim)

    with monkeypatch.context() as patch:
        fail_after(patch, 3, action)
        with pytest.raises(CheckpointError, match="tensor00002_000") as error:
            convert(source, out, **SETTINGS)
    assert "changed while it was being read" in str(error.value)
    # No shard of mixed bytes got its name.
    for shard in out.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            assert not any("layers.0.block_sparse_moe.experts" in name for name in file.keys())  # noqa: SIM118
    assert not list(out.glob("*.partial"))


@pytest.fixture
def unfinished(source, tmp_path) -> Path:
    """A folder with an unfinished conversion."""

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", progress=interrupt, **SETTINGS)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float32"}, "dtype: the unfinished conversion there has 'bfloat16', this one 'float32'"),
        ({"layout": "fused"}, "layout: the unfinished conversion there has 'hub', this one 'fused'"),
        ({"max_shard_size": "70KB"}, "max_shard_size: the unfinished conversion there has 120000, this one 70000"),
    ],
)
def test_other_settings_are_refused_by_name(source, unfinished, changed, message):
    before = contents(unfinished)
    with pytest.raises(ConversionError) as error:
        convert(source, unfinished, **{**SETTINGS, **changed})
    assert message in str(error.value)
    assert contents(unfinished) == before


def test_another_config_is_refused_by_its_key(source, unfinished, tmp_path):
    values = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 77}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=r"config max_position_embeddings: .* has \d+, this one 77"):
        convert(source, unfinished, config=tmp_path / "config.json", **SETTINGS)


def test_another_source_is_refused_by_its_files(golden, unfinished, tmp_path):
    shutil.copytree(golden / "tiny-1", tmp_path / "other")
    victim = tmp_path / "other" / "ckpt-0" / "tensor00003_000"
    os.utime(victim, ns=(1, 1))
    with pytest.raises(ConversionError, match="source tensor00003_000: the unfinished conversion there has"):
        convert(tmp_path / "other", unfinished, **SETTINGS)


def test_finished_shards_are_not_written_again(source, expected, unfinished):
    before = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    assert before
    seen = []
    convert(source, unfinished, progress=lambda done, total: seen.append(done), **SETTINGS)
    after = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    assert before.items() <= after.items()
    assert seen[0] > 0
    assert seen == sorted(seen)
    assert contents(unfinished) == expected


def test_two_runs_exclude_each_other(source, expected, tmp_path):
    errors = []

    def start_another(done, total):
        if not errors:
            try:
                convert(source, tmp_path / "out", **SETTINGS)
            except ConversionError as error:
                errors.append(str(error))

    convert(source, tmp_path / "out", progress=start_another, **SETTINGS)
    assert "another conversion is writing there" in errors[0]
    assert contents(tmp_path / "out") == expected
