"""`grok1 demo`, `grok1 generate` and `grok1 tokenizer`, as a user runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import grok1
from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.demo import passages


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
OPENING, CONTINUATION = PASSAGES[0]["opening"], PASSAGES[0]["continuation"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "folder"
    convert(DEMO, out, dtype="float32")
    return out


def grok1(*arguments: object, stdin: str | None = None, code: int = 0) -> str:
    """What the command prints; for a failure, its message."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def test_demo_prints_verbatim_passages_and_the_experts():
    output = grok1("demo")
    for passage in PASSAGES[:3]:
        assert passage["opening"] + passage["continuation"] in output
    assert output.count("word for word") == 4
    assert "8 of 8 passages word for word" in output
    assert "tokens/s" in output and " MB" in output
    assert output.count("layer ") == 4


def test_demo_keeps_the_folder_when_asked(tmp_path):
    grok1("demo", "--out", tmp_path / "kept")
    said = grok1("generate", tmp_path / "kept", OPENING, "--max-new-tokens", 20)
    assert said.startswith(OPENING + " discontent\nMade glorious")
    assert "kept" in grok1("demo", "--out", tmp_path, code=2)  # not empty


def test_demo_copies_its_checkpoint_when_asked(tmp_path):
    output = grok1("demo", "--checkpoint", tmp_path / "grok-1", "--out", tmp_path / "hf")
    assert {path.name for path in (tmp_path / "grok-1").iterdir()} == {"ckpt-0", "config.json", "tokenizer.model"}
    assert f"grok1 convert {tmp_path / 'grok-1'} OUT" in output
    assert "50 of 50 files are sound" in grok1("inspect", tmp_path / "grok-1")
    assert "bit-identical" in grok1("verify", tmp_path / "hf", "--against", tmp_path / "grok-1")
    assert "expected no such folder" in grok1("demo", "--checkpoint", tmp_path / "grok-1", code=2)


def test_demo_fails_when_a_word_is_wrong(tmp_path, monkeypatch):
    """The verdict is measured: with another passage to compare with, it is no longer word for word."""
    shutil.copytree(DEMO, tmp_path / "demo")
    changed = [PASSAGES[0] | {"continuation": CONTINUATION.replace("summer", "winter")}, *PASSAGES[1:]]
    (tmp_path / "demo" / "passages.json").write_text(json.dumps(changed))
    monkeypatch.setattr(passages, "files", lambda package: tmp_path)
    output = grok1("demo", code=1)
    assert "7 of 8 passages word for word" in output and "not word for word" in output


def test_generate_is_greedy_and_prints_what_generate_returns(folder):
    output = grok1("generate", folder, OPENING, "--max-new-tokens", 100)
    assert output.startswith((OPENING + CONTINUATION)[:200])
    assert grok1("generate", folder, "-", "--max-new-tokens", 100, stdin=OPENING) == output


def test_generate_samples_with_a_seed(folder):
    sampled = ("generate", folder, "ROMEO:\n", "--max-new-tokens", 40, "--temperature", 1.5)
    first = grok1(*sampled, "--seed", 1)
    assert grok1(*sampled, "--seed", 1) == first
    assert grok1(*sampled, "--seed", 2) != first
    # Sampling from the one likeliest token is greedy decoding.
    greedy = grok1("generate", folder, "ROMEO:\n", "--max-new-tokens", 40)
    assert grok1(*sampled, "--top-k", 1) == greedy
    assert first != greedy


def test_generate_says_what_is_wrong(folder, tmp_path):
    output = grok1("generate", DEMO, "x", code=2)
    assert "this is xAI's own checkpoint" in output and "`grok1 convert" in output
    output = grok1("generate", folder, "x", "--top-k", 5, "--top-p", 0.5, code=2)
    assert "--top-k" in output and "--top-p" in output
    assert "found 'int7'" in " ".join(grok1("generate", folder, "x", "--precision", "int7", code=2).split())
    assert "expected text, found none" in grok1("generate", folder, "", code=2)
    output = grok1("generate", folder, "x", "--max-new-tokens", 511, code=2)
    assert "expected at most 512, found 2 of the prompt and 511" in output
    assert "grok1 convert" in grok1("generate", tmp_path, "x", code=2)


def test_routing_in_a_process_of_its_own_asks_nothing(folder, tmp_path):
    """The folder's own code is not run, and Transformers does not ask whether to."""
    (tmp_path / "text.txt").write_text(OPENING)
    words = [sys.executable, "-m", "grok1", "routing", str(folder), "--text", str(tmp_path / "text.txt")]
    done = subprocess.run(words, input="", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("text.txt: ") and "[y/N]" not in done.stdout + done.stderr


def test_tokenizer_writes_three_files(tmp_path):
    grok1("tokenizer", DEMO / "tokenizer.model", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    output = grok1("tokenizer", DEMO / "tokenizer.model", tmp_path / "other", "--vocab-size", 1000, code=2)
    assert "expected at most the model's vocabulary of 1000, found 1024" in output
    assert not (tmp_path / "other").exists()


@pytest.mark.slow  # compiles for a minute
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_generate_compiled_recites(tmp_path, dtype):
    convert(DEMO, tmp_path / "folder", dtype=dtype)
    words = ["generate", tmp_path / "folder", OPENING, "--max-new-tokens", 24]
    assert grok1(*words, "--compile") == grok1(*words)
