"""The package's own table of the release is the published one: every path, shape, dtype, size and checksum."""

import json

from grok1.conversion.release import release_files
from grok1.conversion.xai.writer import tensor_frame


def test_the_table_equals_the_published_index(assets):
    lines = (assets / "checkpoint-index.jsonl").read_text().splitlines()
    assert len(lines) == 770
    for line, file in zip(map(json.loads, lines), release_files(), strict=True):
        assert line == {
            "index": file.entry.index,
            "file": file.entry.file,
            "path": file.entry.path,
            "layer": file.entry.layer,
            "kind": file.entry.kind.name,
            "weight_shape": list(file.entry.shape),
            "weight_dtype": file.entry.dtype,
            "scales_shape": file.scales_shape and list(file.scales_shape),
            "scales_dtype": file.scales_shape and "bfloat16",
            "file_size": file.size,
            "sha256": file.sha256,
        }


def test_the_table_adds_up():
    files = release_files()
    assert len(files) == 770
    assert sum(file.size for file in files) == 318_239_886_140
    assert len({file.sha256 for file in files}) == 770
    assert all(len(file.sha256) == 64 and set(file.sha256) <= set("0123456789abcdef") for file in files)
    assert [file.entry.layer for file in files[2::12]][:5] == [0, 1, 10, 11, 12]


def test_the_writer_gives_every_file_its_published_size():
    for file in release_files():
        assert tensor_frame(file.entry.shape, file.scales_shape).size == file.size, file.entry.path
