"""What `convert` refuses, with every problem at once and nothing touched."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from grok1.conversion import plan as plan_module
from grok1.conversion.convert import convert
from grok1.conversion.xai.checkpoint import read_tensor_file
from grok1.conversion.xai.writer import tensor_frame, write_tensor_file
from grok1.errors import CheckpointError, ConversionError


@pytest.fixture
def source(golden, tmp_path) -> Path:
    shutil.copytree(golden / "tiny-1", tmp_path / "source")
    return tmp_path / "source"


def refusal(source: Path, out: Path, **settings) -> str:
    """The message of the refusal; `out` is as it was."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} if out.is_dir() else None
    with pytest.raises(ConversionError) as error:
        convert(source, out, **{"no_tokenizer": True, **settings})
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} if out.is_dir() else None
    assert after == before
    return str(error.value)


def test_all_problems_come_in_one_message(source, tmp_path):
    files = source / "ckpt-0"
    (files / "tensor00003_000").unlink()
    (files / "tensor00004_000").write_bytes(b"\0" * 1000)
    with (files / "tensor00005_000").open("ab") as file:
        file.write(b"x")
    (files / "notes.txt").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    message = refusal(
        source, tmp_path / "out", dtype="fp8", layout="sharded", max_shard_size="many", no_tokenizer=False
    )
    for expected in (
        "tensor00003_000: expected transformer/decoder_layer_0/moe/linear_1/w, found no such file",
        "tensor00004_000: expected",
        "tensor00005_000: expected",
        "notes.txt",
        "dtype: expected one of bfloat16, float32, int8, int4, found 'fp8'",
        "layout: expected one of hub, fused, hpcai, keyfan, gguf, found 'sharded'",
        "`max_shard_size`: expected a size such as 5GB",
        "tokenizer.model: expected",
    ):
        assert expected in message
    message = refusal(source, tmp_path / "out")
    assert "tensor00003_000" in message
    assert "expected an empty folder or none, found precious" in message


def test_a_missing_tokenizer_says_where_to_get_it(source, tmp_path):
    message = refusal(source, tmp_path / "out", no_tokenizer=False)
    assert "https://github.com/xai-org/grok-1/raw/main/tokenizer.model" in message
    assert "--no-tokenizer" in message
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none(source, tmp_path):
    (source / "tokenizer.model").write_text("not a model")
    assert "expected a SentencePiece model" in refusal(source, tmp_path / "out", no_tokenizer=False)


def test_a_tokenizer_with_too_many_pieces(source, tmp_path, assets):
    shutil.copy(assets / "tokenizer.model", source)
    assert "131072" in refusal(source, tmp_path / "out", no_tokenizer=False)


def test_a_folder_with_something_in_it(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    message = refusal(source, tmp_path / "out")
    assert "expected an empty folder or none, found thesis.tex" in message


def test_another_finished_conversion_is_not_overwritten(source, tmp_path):
    convert(source, tmp_path / "out", no_tokenizer=True)
    message = refusal(source, tmp_path / "out", dtype="float32")
    assert "expected an empty folder or none, found another finished conversion" in message
    assert "config.json: not as this command would write it" in message


def test_an_empty_folder_is_taken(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", no_tokenizer=True)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_file_in_place_of_the_folder(source, tmp_path):
    (tmp_path / "out").write_text("x")
    assert "expected a folder or nothing, found a file" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("where", ["ckpt-0", "ckpt-0/out"])
def test_an_output_inside_the_checkpoint(source, where):
    assert "expected a folder outside the checkpoint" in refusal(source, source / where)


def test_a_place_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "cannot be" in refusal(source, tmp_path / "file" / "out")

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "cannot be written\n  - [Errno 30] Read-only file system" in refusal(source, tmp_path / "out")


def test_too_little_disk_is_found_before_the_first_byte(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refusal(source, tmp_path / "out")
    assert "free bytes on the disk, found 1,000" in message
    assert not (tmp_path / "out").exists()


def test_no_config_and_not_the_release(source, tmp_path):
    (source / "config.json").unlink()
    (tmp_path / "config.json").unlink(missing_ok=True)
    message = refusal(source, tmp_path / "out")
    assert "embedding: expected (131072, 6144) as in the release, found (" in message
    assert "among 38 files" in message
    assert "--config" in message


def test_the_config_is_looked_for_in_the_folder_and_above(source, tmp_path):
    convert(source / "ckpt-0", tmp_path / "above", no_tokenizer=True)
    (source / "config.json").rename(source / "ckpt-0" / "config.json")
    convert(source / "ckpt-0", tmp_path / "inside", no_tokenizer=True)
    convert(source, tmp_path / "from above", no_tokenizer=True)
    (source / "ckpt-0" / "config.json").rename(tmp_path / "other.json")
    convert(source, tmp_path / "named", config=tmp_path / "other.json", no_tokenizer=True)
    texts = {(tmp_path / name / "config.json").read_text() for name in ("above", "inside", "from above", "named")}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not the config of a Grok-1"),
        ("[]", "expected a JSON object, found a list"),
        ('{"model_type": "llama"}', "model_type: expected 'grok-1', found 'llama'"),
        ('{"hidden_act": "silu"}', "hidden_act"),
    ],
)
def test_a_config_that_is_none(source, tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    assert expected in refusal(source, tmp_path / "out", config=tmp_path / "config.json")


def test_a_config_of_other_sizes(source, tmp_path):
    values = json.loads((source / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(values | {"intermediate_size": values["intermediate_size"] * 2}))
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "out", config=tmp_path / "other.json", no_tokenizer=True)
    assert len(error.value.problems) == 9  # gate, up and down of three layers
    assert "--config" in str(error.value)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
def test_scales_that_are_not_finite(source, tmp_path, bits):
    path = source / "ckpt-0" / "tensor00002_000"
    file = read_tensor_file(path)
    weight, scales = file.weight.read(), file.scales.read()
    scales[0, 0, 3] = bits
    write_tensor_file(path, tensor_frame(weight.shape, scales.shape), [weight], lambda: scales)
    assert "tensor00002_000: expected finite scales" in refusal(source, tmp_path / "out")


@pytest.mark.parametrize("layout", ["fused", "hpcai", "keyfan"])
def test_int8_in_layouts_whose_readers_do_not_know_it(source, tmp_path, layout):
    message = refusal(source, tmp_path / "out", dtype="int8", layout=layout)
    assert f"layout: expected hub or gguf with dtype int8 (no engine reads another), found '{layout}'" in message


def test_groups_that_do_not_divide_are_refused_with_what_would_do(source, tmp_path):
    message = refusal(source, tmp_path / "out", dtype="int8", group_size=3)
    assert "group_size: expected a divisor of the 32 inputs of a scale block of moe_gate, found 3" in message
    assert "would do" in message
    message = refusal(source, tmp_path / "out", dtype="bfloat16", group_size=32)
    assert "group_size: expected with dtype int8 or int4 only, found with bfloat16" in message
