"""`verify`, `inspect` and `export-xai` on GGUF files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import write_random_checkpoint
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.conversion.export_xai import export_xai
from grok1.conversion.inspect_gguf import inspect_gguf
from grok1.conversion.verify_output import verify_output
from grok1.errors import ConversionError
from grok1.gguf_files import read_gguf


gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "random")


@pytest.fixture(scope="module")
def split(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("split") / "out"
    convert(source, out, layout="gguf", dtype="int8", max_shard_size="400KB", no_tokenizer=True)
    return out


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "ckpt-0").iterdir()}


def test_a_file_and_its_folder_are_right(source, split):
    first = sorted(split.glob("*.gguf"))[0]
    assert verify_output(split, source) == []
    assert verify_output(first, source) == []
    assert CliRunner().invoke(app, ["verify", str(first)]).exit_code == 0


@pytest.mark.parametrize("dtype", ["int4", "bfloat16"])
def test_other_precisions_are_verified(source, tmp_path, dtype):
    convert(source, tmp_path / "out", layout="gguf", dtype=dtype, embedding="q8_0", no_tokenizer=True)
    assert verify_output(tmp_path / "out", source) == []


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_one_flipped_bit_is_found_wherever_it_is(source, split, tmp_path):
    shutil.copytree(split, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    tensors = read_gguf(tmp_path / "out").tensors
    random = np.random.default_rng(0)
    names = ["token_embd.weight", "output_norm.weight", "blk.10.ffn_down_exps.weight", "blk.3.ffn_gate_inp.weight"]
    for name in names:
        tensor = tensors[name]
        place = tensor.offset + int(random.integers(tensor.nbytes))
        flip(tensor.file, place)
        problems = verify_output(files[0], source)
        flip(tensor.file, place)
        assert len(problems) == 1 and problems[0].startswith(f"{name}: 1 bytes differ from the source"), problems
    # A key, and a byte that belongs to nothing.
    data = files[0].read_bytes()
    flip(files[0], data.index(b"apache-2.0"))
    problems = verify_output(files[0], source)
    assert any("general.license" in problem for problem in problems), problems
    flip(files[0], data.index(b"apache-2.0"))
    assert verify_output(files[0], source) == []


def test_a_missing_split_and_a_cut_file_are_named(source, split, tmp_path):
    shutil.copytree(split, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    data = files[1].read_bytes()
    files[1].write_bytes(data[: len(data) // 2])
    assert any(files[1].name in problem for problem in verify_output(files[0], source))
    files[1].unlink()
    assert any(f"{files[1].name}: expected a file, found none" in line for line in verify_output(files[0], source))
    for path in files[2:]:
        path.write_bytes(b"GGUF" + bytes(100))
    assert verify_output(files[0], source)


def test_a_file_of_another_checkpoint_is_not_taken(split, tmp_path):
    other = write_random_checkpoint(tmp_path / "other", first_scale=0x3A01)
    problems = verify_output(split, other)
    assert any(problem.startswith("blk.0.attn_k.weight: ") for problem in problems)


def test_rounded_scales_are_counted(tmp_path):
    source = write_random_checkpoint(tmp_path / "source", first_scale=0x33A0)
    convert(source, tmp_path / "out", layout="gguf", dtype="int8", round_scales=True, no_tokenizer=True)
    problems = verify_output(tmp_path / "out", source)
    assert len(problems) == 1
    assert problems[0].startswith("blk.0.attn_k.weight: ") and "whose scales float16 does not hold" in problems[0]


def test_xais_files_come_back_byte_for_byte(source, split, tmp_path):
    report = export_xai(split, tmp_path / "exported")
    assert tensor_files(tmp_path / "exported") == tensor_files(source)
    assert report.losses == {} and report.widened == []
    # From the files alone: the config comes from their metadata.
    (tmp_path / "alone").mkdir()
    for path in split.glob("*.gguf"):
        shutil.copy(path, tmp_path / "alone")
    first = sorted((tmp_path / "alone").glob("*.gguf"))[0]
    export_xai(first, tmp_path / "again")
    assert tensor_files(tmp_path / "again") == tensor_files(source)
    ours, theirs = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "again", source))
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "embedding_multiplier_scale", "logit_scale")
    assert {key: ours[key] for key in sizes} == {key: theirs[key] for key in sizes}


def test_other_precisions_are_exported_with_their_loss(source, tmp_path):
    convert(source, tmp_path / "out", layout="gguf", dtype="bfloat16", no_tokenizer=True)
    report = export_xai(tmp_path / "out", tmp_path / "exported", scale_blocks=2)
    assert set(report.losses) == {"moe_gate", "moe_down", "moe_up", "attn_k", "attn_o", "attn_q", "attn_v"}
    assert report.widened == ["tensor00000_000"]


def test_blocks_that_were_quantised_again_are_not_called_xais(source, split, tmp_path):
    """Another scale in a block after the sampled rows: found when it is read, and nothing is left."""
    shutil.copytree(split, tmp_path / "out")
    tensor = read_gguf(tmp_path / "out").tensors["blk.5.attn_q.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes - 34)
        file.write(np.float16(0.3).tobytes())
    with pytest.raises(ConversionError, match="decoder_layer_5/multi_head_attention/query"):
        export_xai(tmp_path / "out", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_inspect_shows_keys_and_tensors(split):
    found = inspect_gguf(sorted(split.glob("*.gguf"))[0])
    assert found.problems == [] and all(kind.present == kind.expected for kind in found.kinds)
    assert found.keys["grok.block_count"] == 12 and found.keys["split.count"] == len(found.files)
    result = CliRunner().invoke(app, ["inspect", str(split)])
    assert result.exit_code == 0 and "ffn_down_exps.weight" in result.output and "12 of 12" in result.output
