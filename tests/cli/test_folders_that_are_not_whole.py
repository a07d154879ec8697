"""Every command that opens a folder says in one sentence which weight file is missing, cut off or another's."""

import json
import shutil

import pytest
from local_server import DEMO
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "hf"
    convert(DEMO, out, max_shard_size="4MB")
    return out


def outside(folder):
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../stolen.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(first_shard(folder), folder.parent / "stolen.safetensors")
    return "../stolen.safetensors: expected the name of a file in the folder, found a path"


def missing(folder):
    shard = first_shard(folder)
    shard.unlink()
    return f"{shard.name}: expected a file, found none"


def torn(folder):
    shard = first_shard(folder)
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    return f"{shard.name}: expected {len(data)} bytes, found {len(data) - 100}"


def no_index(folder):
    (folder / INDEX).write_text("{}")
    return "expected an index with a weight_map, found none"


def first_shard(folder):
    return next(iter(sorted(folder.glob("*.safetensors"))))


COMMANDS = {
    "generate": ["generate", "FOLDER", "the"],
    "serve": ["serve", "FOLDER", "--port", "0"],
    "eval": ["eval", "FOLDER", "--text", "TEXT"],
    "eval-against": ["eval", "WHOLE", "--text", "TEXT", "--against", "FOLDER"],
    "routing": ["routing", "FOLDER", "--text", "TEXT"],
    "export-xai": ["export-xai", "FOLDER", "OUT"],
    "card": ["card", "FOLDER", "--force"],
}


@pytest.mark.parametrize("fault", [outside, missing, torn, no_index], ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_file_is_named(command, fault, whole, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(whole, folder)
    says = fault(folder)
    (tmp_path / "text.txt").write_text("Now is the winter of our discontent")
    places = {"FOLDER": folder, "WHOLE": whole, "TEXT": tmp_path / "text.txt", "OUT": tmp_path / "out"}
    result = CliRunner().invoke(app, [str(places.get(word, word)) for word in COMMANDS[command]])
    assert result.exit_code == 2, result.output
    assert says in result.output and str(folder) in result.output
    assert "Internal error" not in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
