"""convert, adopt and export-xai, run again after they finished, say so and touch nothing; anything else is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.adopt import adopt
from grok1.conversion.convert import convert
from grok1.conversion.export_xai import export_xai
from grok1.errors import ConversionError


SETTINGS = {"no_tokenizer": True, "max_shard_size": "300KB"}


def states(folder: Path) -> dict[str, tuple]:
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.stat().st_ctime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture
def source(golden, tmp_path) -> Path:
    shutil.copytree(golden / "tiny-1", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def folder(source, tmp_path) -> Path:
    convert(source, tmp_path / "out", dtype="float32", **SETTINGS)
    return tmp_path / "out"


def test_convert(source, folder):
    before = states(folder)
    plan = convert(source, folder, dtype="float32", **SETTINGS)
    assert plan.is_finished and plan.finished_bytes == plan.nbytes
    assert states(folder) == before


def test_adopt(folder, tmp_path):
    first = adopt(folder, tmp_path / "adopted")
    before = states(tmp_path / "adopted")
    again = adopt(folder, tmp_path / "adopted")
    assert (first.is_finished, again.is_finished) == (False, True)
    assert states(tmp_path / "adopted") == before
    with pytest.raises(ConversionError, match="found another finished conversion"):
        adopt(folder, tmp_path / "adopted", max_shard_size="100KB")


def test_export(folder, tmp_path):
    first = export_xai(folder, tmp_path / "exported", scale_blocks=1)
    before = states(tmp_path / "exported")
    again = export_xai(folder, tmp_path / "exported", scale_blocks=1)
    assert (first.is_finished, again.is_finished) == (False, True)
    assert (again.files, again.nbytes) == (first.files, first.nbytes)
    assert states(tmp_path / "exported") == before
    with pytest.raises(ConversionError, match="expected an empty folder or none"):
        export_xai(folder, tmp_path / "exported", scale_blocks=8)


def test_the_commands_end_with_0_and_say_so(source, folder, tmp_path):
    def grok1(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    words = ("convert", source, folder, "--no-tokenizer", "--max-shard-size", "300KB", "--dtype", "float32")
    assert "converted already" in grok1(*words)
    assert json.loads(grok1(*words, "--json"))["shards"] == len(list(folder.glob("*.safetensors")))
    assert "already" not in grok1("adopt", folder, tmp_path / "adopted")
    assert "adopted already" in grok1("adopt", folder, tmp_path / "adopted")
    assert "already" not in grok1("export-xai", folder, tmp_path / "exported", "--scale-blocks", "1")
    assert "exported already" in grok1("export-xai", folder, tmp_path / "exported", "--scale-blocks", "1")


@pytest.mark.parametrize("damage", ["config", "code", "shard", "header"])
def test_a_folder_that_was_changed_is_not_taken_for_finished(source, folder, damage):
    shard = sorted(folder.glob("*.safetensors"))[1]
    if damage == "config":
        (folder / "config.json").write_text((folder / "config.json").read_text().replace("30.0", "31.0"))
    elif damage == "code":
        (folder / "modeling_grok1.py").write_text("print('hello')")
    elif damage == "shard":
        shard.unlink()
    else:
        tensors = load_file(shard)
        save_file({f"{name}x": tensor for name, tensor in tensors.items()}, shard)
    before = states(folder)
    with pytest.raises(ConversionError, match="found another finished conversion"):
        convert(source, folder, dtype="float32", **SETTINGS)
    assert states(folder) == before


def test_a_source_with_other_values_is_another_one(golden, source, folder, tmp_path):
    """Of the same sizes and older than the conversion: found by the values of norms and routers."""
    victim = source / "ckpt-0" / "tensor00001_000"
    data = bytearray(victim.read_bytes())
    data[-40] ^= 1
    (tmp_path / "new").write_bytes(data)
    victim.unlink()
    (tmp_path / "new").rename(victim)
    later = max(path.stat().st_ctime_ns for path in source.rglob("*")) + 10**9
    os.utime(folder / "SHA256SUMS", ns=(later, later))
    with pytest.raises(ConversionError, match=r"model\.norm\.weight: not the values of this source"):
        convert(source, folder, dtype="float32", **SETTINGS)


@pytest.mark.parametrize("command", ["convert", "adopt"])
def test_a_source_that_was_replaced_afterwards_is_another_one(source, folder, tmp_path, command):
    """The same bytes under the same name: which they are cannot be known without reading all of them."""
    if command == "adopt":
        adopt(folder, tmp_path / "adopted")
    victim = source / "ckpt-0" / "tensor00003_000" if command == "convert" else sorted(folder.glob("*.safetensors"))[0]
    before = victim.stat()
    victim.write_bytes(victim.read_bytes())
    os.utime(victim, ns=(0, before.st_mtime_ns))
    with pytest.raises(ConversionError, match=f"{victim.name}: changed after the conversion"):
        if command == "convert":
            convert(source, folder, dtype="float32", **SETTINGS)
        else:
            adopt(folder, tmp_path / "adopted")
