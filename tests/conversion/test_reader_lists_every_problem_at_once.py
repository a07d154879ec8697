"""A damaged folder is described in one pass, every problem with its file, what was expected and what was found."""

import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from xai_files import float_file, int8_file

from grok1.conversion.names import checkpoint_entries
from grok1.conversion.xai.checkpoint import examine_folder, list_files, read_tensor_file


@pytest.fixture
def source(golden, tmp_path):
    shutil.copytree(golden / "tiny-1", tmp_path / "src")
    (tmp_path / "src").chmod(0o755)
    folder = tmp_path / "src" / "ckpt-0"
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


@pytest.fixture
def entries(golden):
    return checkpoint_entries(SimpleNamespace(**json.loads((golden / "tiny-1" / "config.json").read_text())))


def test_a_sound_folder_has_no_problems(golden, source, entries):
    (source / ".grok1-verify.json").write_text("{}")
    (source / "config.json").write_text("{}")
    tensors, problems = examine_folder(source, entries)
    assert problems == []
    assert sorted(tensors) == list(range(38))
    assert [path.name for path in list_files(source)] == [f"tensor{i:05d}_000" for i in range(38)]


def test_every_problem_of_a_damaged_folder_is_in_one_list(source, entries, tmp_path):
    def file(index):
        return source / f"tensor{index:05d}_000"

    size = {index: file(index).stat().st_size for index in range(38)}
    file(0).unlink()
    os.truncate(file(2), 20_000)
    file(3).write_bytes(bytes(size[3]))
    with file(4).open("ab") as over:
        over.write(b"more")
    quantised = read_tensor_file(file(5))
    scales = quantised.scales.read()
    scales[0, 3:5] = 0x7F80, 0xFFC0
    file(5).write_bytes(int8_file(quantised.weight.read(), scales))
    file(6).write_bytes(int8_file(np.zeros((16, 32), np.int8), np.ones((1, 32), np.uint16)))
    file(7).write_bytes(float_file(np.zeros((32, 128))))
    file(8).write_bytes(pickle.dumps(print, protocol=4))
    file(9).write_bytes(b"")
    outside = tmp_path / "outside"
    shutil.move(file(10), outside)
    file(10).symlink_to(outside)
    shutil.copy(file(11), source / "tensor00038_000")
    (source / "notes.txt").write_text("")
    (source / "tensor00011_000.incomplete").write_text("")
    (source / "more").mkdir()

    tensors, problems = examine_folder(source, entries)
    about = {line.split(":")[0]: line for line in problems}
    assert len(problems) == len(about) == 14
    for name, found in {
        "tensor00000_000": "expected language_model/in_out_embed/embeddings, found no such file",
        "tensor00002_000": "found 20000 bytes (truncated)",
        "tensor00003_000": f"found {size[3]} bytes that begin with zero bytes (an unfinished download)",
        "tensor00004_000": f"expected {size[4]} bytes, found {size[4] + 4} bytes (over-long",
        "tensor00005_000": "decoder_layer_0/multi_head_attention/key/w, found 2 that are NaN or infinite",
        "tensor00006_000": "as int8 (96, 32), found int8 (16, 32)",
        "tensor00007_000": "as int8 (32, 96), found float32 (32, 128)",
        "tensor00008_000": "a pickle that refers to builtins.print",
        "tensor00009_000": "an empty file",
        "tensor00010_000": f"a link out of it, to {outside}",
        "tensor00038_000": "expected 38 files, the last tensor00037_000, found one more",
        "notes.txt": "an unknown file",
        "tensor00011_000.incomplete": "an unknown file",
        "more": "an unknown folder",
    }.items():
        assert found in about.pop(name), name
    assert about == {}
    assert {1, *range(11, 38)} <= tensors.keys()


def test_links_inside_the_folder_and_into_a_hub_cache_are_followed(source, entries, tmp_path):
    shutil.move(source / "tensor00001_000", source / ".blob")
    (source / "tensor00001_000").symlink_to(".blob")
    assert examine_folder(source, entries)[1] == []

    cache = tmp_path / "models--xai-org--grok-1"
    snapshot = cache / "snapshots" / "0123abcd" / "ckpt-0"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in list_files(source):
        shutil.copyfile(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../../blobs/{path.name}")
    assert examine_folder(snapshot, entries)[1] == []
    (snapshot / "tensor00001_000").unlink()
    (snapshot / "tensor00001_000").symlink_to("../../../../src/ckpt-0/tensor00001_000")
    (problem,) = examine_folder(snapshot, entries)[1]
    assert problem.startswith("tensor00001_000: expected a file of this folder, found a link out of it")
