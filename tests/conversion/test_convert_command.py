"""`grok1 convert` as a user types it: results, refusals, the dry run, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.conversion.dry_run import Forecast, forecast


@pytest.fixture
def grok1():
    runner = CliRunner()
    return lambda *words: runner.invoke(app, [str(word) for word in words])


def test_it_converts_and_says_what(grok1, golden, tmp_path):
    result = grok1("convert", golden / "tiny-1", tmp_path / "out", "--no-tokenizer", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: 1 shards in float32" in result.stdout
    assert (tmp_path / "out" / "config.json").is_file()


def test_json(grok1, golden, tmp_path):
    result = grok1(
        "convert", golden / "tiny-1", tmp_path / "out", "--no-tokenizer", "--max-shard-size", "1MB", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert found["shards"] == len(shards)
    assert found["bytes"] == sum(path.stat().st_size for path in shards)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dtype", "fp8"], "dtype: expected one of"),
        (["--layout", "x"], "layout: expected one of"),
        (["--config", "nothing.json"], "nothing.json"),
        (["--max-shard-size", "x"], "`max_shard_size`: expected a size"),
        (["--tokenizer", "nothing.model"], "tokenizer: expected a file or no_tokenizer, found both"),
    ],
)
def test_bad_input_exits_with_2(grok1, golden, tmp_path, words, expected):
    result = grok1("convert", golden / "tiny-1", tmp_path / "out", "--no-tokenizer", *words)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_dry_run_of_the_release_needs_no_files(grok1, tmp_path):
    result = grok1("convert", "xai-org/grok-1", tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["source"] == "the table of the release"
    assert len(found["shards"]) == 130
    assert found["nbytes"] == sum(found["shards"].values())
    # 632,989,704,192 bytes of tensors, and headers.
    assert 632_989_704_192 < found["nbytes"] < 632_989_704_192 + 10**6
    assert found["needed_bytes"] > found["nbytes"]
    assert found["peak_bytes"] <= 2**30
    assert found["bytes_per_second"] > 0
    assert found["seconds"] == pytest.approx(found["nbytes"] / found["bytes_per_second"])
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_prints_every_shard_and_the_sums(grok1, golden, tmp_path):
    words = ("convert", golden / "tiny-1", tmp_path / "out", "--no-tokenizer", "--max-shard-size", "100KB")
    assert ".safetensors" not in grok1(*words, "--dry-run").stdout
    result = grok1(*words, "--dry-run", "--list-shards")
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == []
    grok1(*words)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert f"{shard.name}  {shard.stat().st_size:>16,} bytes" in result.stdout
    for word in ("output", "disk", "memory", "time"):
        assert f"\n{word} " in result.stdout


def test_a_folder_that_is_converted_already_is_called_so(grok1, golden, tmp_path):
    grok1("convert", golden / "tiny-1", tmp_path / "out", "--no-tokenizer")
    result = grok1("convert", tmp_path / "out", tmp_path / "again", "--no-tokenizer")
    assert result.exit_code == 2 and "found a folder that is converted already" in result.stderr
    assert f"grok1 generate {tmp_path / 'out'}" in result.stderr and not (tmp_path / "again").exists()


def test_the_dry_run_refuses_what_the_run_would(grok1, golden, tmp_path):
    result = grok1("convert", golden / "tiny-1", tmp_path / "out", "--dry-run")
    assert result.exit_code == 2
    assert "tokenizer.model: expected" in result.stderr


def test_the_forecast_counts_what_is_left(golden, tmp_path):
    settings = {"no_tokenizer": True, "max_shard_size": "100KB"}
    whole = forecast(golden / "tiny-1", tmp_path / "out", **settings)

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(golden / "tiny-1", tmp_path / "out", progress=interrupt, **settings)
    rest = forecast(golden / "tiny-1", tmp_path / "out", **settings)
    finished = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert finished > 0
    assert whole.needed_bytes - rest.needed_bytes == finished
    assert isinstance(rest, Forecast)
    assert rest.shards == whole.shards


def test_too_little_disk_is_told_not_refused_in_a_dry_run(grok1, tmp_path, monkeypatch):
    monkeypatch.setattr("grok1.conversion.dry_run.free_bytes", lambda *_: 1000)
    result = grok1("convert", "xai-org/grok-1", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "1,000 free: " in result.stdout
    assert "too few" in result.stdout


def test_ctrl_c_leaves_what_can_be_continued_and_says_so(golden, tmp_path):
    # Slow writes stand for large tensors; from the 60th on they leave a busy machine time to send the signal.
    script = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from grok1.cli import main
from grok1.conversion import convert
real, written = os.pwrite, []
def pwrite(*arguments):
    os.write(1, b"writing\\n")
    written.append(1)
    time.sleep(0.02 if len(written) < 60 else 1)
    return real(*arguments)
os.pwrite = pwrite
main()
"""
    words = ["convert", str(golden / "tiny-1"), str(tmp_path / "out"), "--no-tokenizer", "--max-shard-size", "100KB"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for _ in range(60):
        assert child.stdout.readline() == "writing\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"finished shards are kept in {tmp_path / 'out'}: run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*.partial"))
    assert not (tmp_path / "out" / "config.json").exists()
    convert(golden / "tiny-1", tmp_path / "out", no_tokenizer=True, max_shard_size="100KB")
    assert (tmp_path / "out" / "config.json").is_file()
