"""`grok1 inspect` tells from headers alone what is there, on whole checkpoints and on any part of a download."""

import json
import os
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner
from xai_files import float_file, tensor_files

from grok1.cli.inspect import inspect_command
from grok1.conversion.inspect import inspect_checkpoint
from grok1.conversion.release import release_files
from grok1.conversion.xai.writer import tensor_frame
from grok1.errors import CheckpointError


app = typer.Typer()
app.command()(inspect_command)


@pytest.fixture
def source(golden, tmp_path):
    folder = tmp_path / "src" / "ckpt-0"
    folder.mkdir(parents=True)
    for path in tensor_files(golden / "tiny-8" / "ckpt-0"):
        shutil.copyfile(path, folder / path.name)
    return folder


def sparse(folder, index, size=None):
    """A file of the release with a hole for its arrays; cut off at `size`."""
    file = release_files()[index]
    frame = tensor_frame(file.entry.shape, file.scales_shape)
    with (folder / file.entry.file).open("wb") as out:
        out.write(frame.before)
        out.seek(frame.weight_nbytes, os.SEEK_CUR)
        out.write(frame.between)
        out.seek(frame.scales_nbytes, os.SEEK_CUR)
        out.write(frame.after)
        out.truncate(file.size if size is None else size)


def test_a_whole_checkpoint_is_described_without_a_config(source):
    found = inspect_checkpoint(source.parent)
    assert (found.is_whole, found.is_release, found.layers) == (True, False, 12)
    assert found.sizes == {"V": 512, "D": 32, "E": 8, "F": 176, "KV": 64, "Q": 128}
    assert (found.readable, found.expected) == (146, 146)
    assert found.nbytes == sum(path.stat().st_size for path in source.iterdir())
    kinds = {kind.kind: kind for kind in found.kinds}
    assert len(kinds) == 14
    down = kinds["moe_down"]
    assert (down.path, down.expected, down.present, down.readable) == ("moe/linear_1/w", 12, 12, 12)
    assert down.nbytes == 12 * (source / "tensor00003_000").stat().st_size
    assert down.shapes == ["int8 (8, 176, 32), scales (8, 8, 32)"]
    assert kinds["router"].shapes == ["float32 (32, 8)"]
    assert kinds["embedding"].shapes == ["float32 (512, 32)"]


def test_what_is_missing_or_damaged_is_told_file_by_file(source):
    for index in (0, 30, 31):
        (source / f"tensor{index:05d}_000").unlink()
    os.truncate(source / "tensor00002_000", 1000)
    (source / "tensor00013_000").write_bytes(float_file(np.zeros((32, 4))))
    (source / "surprise").write_text("")
    found = inspect_checkpoint(source)
    assert found.missing == ["tensor00000_000", "tensor00030_000", "tensor00031_000"]
    assert [line.split(":")[0] for line in found.problems] == ["surprise", "tensor00002_000", "tensor00013_000"]
    assert "found 1000 bytes (truncated)" in found.problems[1]
    assert (
        "expected transformer/decoder_layer_0/router/w as float32 (32, 8), found float32 (32, 4)" in found.problems[2]
    )
    assert (found.readable, found.expected, found.is_whole) == (141, 146, False)
    router = next(kind for kind in found.kinds if kind.kind == "router")
    assert (router.present, router.readable) == (12, 11)


def test_a_part_of_the_release_is_known_by_its_shapes(tmp_path):
    sparse(tmp_path, 3)
    sparse(tmp_path, 6, 37_847_358)
    sparse(tmp_path, 768, 16)
    (tmp_path / "tensor00769_000").write_bytes(bytes(196_770))
    found = inspect_checkpoint(tmp_path)
    assert (found.is_release, found.layers, found.expected, found.readable) == (True, 64, 770, 1)
    assert len(found.missing) == 766
    assert found.problems == [
        "tensor00006_000: expected 37847359 bytes, found 37847358 (99 % of it)",
        "tensor00768_000: expected 24727 bytes, found 16 (0 % of it)",
        "tensor00769_000: expected a pickle of protocol 4, found 196770 bytes that begin with zero bytes "
        "(an unfinished download)",
    ]
    down = next(kind for kind in found.kinds if kind.kind == "moe_down")
    assert (down.readable, down.expected, down.nbytes) == (1, 64, 1_611_399_491)
    assert down.shapes == ["int8 (8, 32768, 6144), scales (8, 8, 6144)"]


def test_the_release_is_known_even_if_no_file_is_readable(tmp_path):
    (tmp_path / "tensor00001_000").write_bytes(bytes(24_727))
    found = inspect_checkpoint(tmp_path)
    assert (found.is_release, found.expected, len(found.missing)) == (True, 770, 769)


def test_the_true_small_files_are_a_part_of_the_release(assets):
    found = inspect_checkpoint(assets / "small-files")
    assert (found.is_release, found.readable, found.problems) == (True, 321, [])
    assert len(found.missing) == 770 - 321


def test_no_tensor_at_all_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        inspect_checkpoint(tmp_path)


def test_the_command_prints_a_table_or_json_and_tells_by_its_exit_code(source):
    whole = CliRunner().invoke(app, [str(source)])
    assert whole.exit_code == 0
    assert "12 of 12" in whole.output
    assert "int8 (8, 176, 32), scales (8, 8, 32)" in whole.output
    for index in (4, 5, 6, 9):
        (source / f"tensor{index:05d}_000").unlink()
    part = CliRunner().invoke(app, [str(source)])
    assert part.exit_code == 1
    assert "4 files are missing: tensor00004_000 to tensor00006_000, tensor00009_000" in part.output
    as_json = CliRunner().invoke(app, [str(source), "--json"])
    assert as_json.exit_code == 1
    values = json.loads(as_json.output)
    assert (values["readable"], values["expected"], values["is_whole"]) == (142, 146, False)
    assert len(values["kinds"]) == 14
