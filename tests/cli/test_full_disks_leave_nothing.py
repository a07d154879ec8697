"""On a full disk the commands that write one file leave what was there, and say where, how much, and what to do.

The disk is one that takes no more than some bytes of a file (RLIMIT_FSIZE, which ends a write like a full disk does).
"""

import shutil
import signal

import pytest
from local_server import DEMO
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert


resource = pytest.importorskip("resource")

COMMANDS = {
    "routing figure": ["routing", "FOLDER", "--text", "TEXT", "--out", "FIGURE.png"],
    "routing page": ["routing", "FOLDER", "--text", "TEXT", "--html", "PAGE.html"],
    "card": ["card", "FOLDER", "--force"],
    "tokenizer": ["tokenizer", "FOLDER/tokenizer.model", "NEW"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "hf"
    convert(DEMO, out)
    (out.parent / "text.txt").write_text("Now is the winter of our discontent")
    return out


@pytest.fixture
def full(monkeypatch):
    """Files of at most 100 bytes."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_left(command, folder, tmp_path, full):
    if "figure" in command:
        pytest.importorskip("matplotlib.backends.backend_agg")
    here = tmp_path / "here"
    shutil.copytree(folder, here / "hf")
    places = {"FOLDER": here / "hf", "TEXT": folder.parent / "text.txt", "NEW": here / "new"}
    places |= {"FIGURE": here / "figure", "PAGE": here / "page"}

    def placed(word):
        for name, place in places.items():
            if word.startswith(name):
                return f"{place}{word.removeprefix(name)}"
        return word

    before = contents(here)
    full()
    result = CliRunner().invoke(app, [placed(word) for word in COMMANDS[command]])
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    assert result.exit_code == 2, result.output
    assert f"Error: {here}" in result.output and "cannot be written" in result.output
    assert "Run the command again" in result.output and "bug" not in result.output
    assert contents(here) == before
