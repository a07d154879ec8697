"""The weights of a converted folder are found without loading any; a folder that lies about itself is refused."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from grok1.arrays import folder_arrays
from grok1.errors import ConversionError


INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16()}, tmp_path / "one.safetensors")
    save_file({"c": torch.arange(-3, 3, dtype=torch.int8).view(2, 3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def refused(folder):
    with pytest.raises(ConversionError) as caught:
        folder_arrays(folder)
    return str(caught.value)


def with_map(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_every_tensor_is_where_safetensors_finds_it(folder):
    found = folder_arrays(folder)
    stored = load_file(folder / "one.safetensors") | load_file(folder / "two.safetensors")
    assert found.keys() == stored.keys()
    np.testing.assert_array_equal(found["a"].read(), stored["a"].numpy())
    np.testing.assert_array_equal(found["b"].read(), stored["b"].view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(found["c"].read_rows((), 1, 2), stored["c"][1:].numpy())
    (folder / INDEX).unlink()
    assert "expected model.safetensors.index.json or model.safetensors" in refused(folder)
    (folder / "two.safetensors").rename(folder / "model.safetensors")
    assert folder_arrays(folder).keys() == {"c"}


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "..", "", "more/one.safetensors"])
def test_a_shard_name_that_leads_out_of_the_folder_is_refused(folder, name):
    with_map(folder, c=name)
    assert "expected the name of a file in the folder, found a path" in refused(folder)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "two.safetensors"
    (folder / "two.safetensors").rename(outside)
    (folder / "two.safetensors").symlink_to(outside)
    assert f"two.safetensors: expected a file of the folder, found a link out of it, to {outside}" in refused(folder)


def test_all_problems_of_all_shards_are_told_at_once(folder):
    one = folder / "one.safetensors"
    one.write_bytes(one.read_bytes()[:-1])
    (folder / "two.safetensors").unlink()
    text = refused(folder)
    assert "one.safetensors: expected" in text
    assert "two.safetensors: expected a file, found none" in text


def test_an_index_that_disagrees_with_the_shards_is_refused(folder):
    with_map(folder, b="two.safetensors", d="two.safetensors")
    text = refused(folder)
    assert "b: expected in two.safetensors, found in one.safetensors" in text
    assert "d: expected in two.safetensors, found nowhere" in text
    save_file({"a": torch.zeros(1)}, folder / "two.safetensors")
    assert "a: expected in one shard, found in two.safetensors too" in refused(folder)


@pytest.mark.parametrize(
    "header, data, message",
    [
        (b"{", b"", "header in JSON"),
        (b"[" * 50_000, b"", "header in JSON"),
        ([], b"", "expected a safetensors header"),
        (
            {"c": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}},
            bytes(2),
            "one of float32, bfloat16, int8, int32, int64, found float16",
        ),
        ({"c": {"dtype": "I8", "shape": [3], "data_offsets": [0, 2]}}, bytes(2), "expected 3 bytes for c"),
        ({"c": {"dtype": "I8", "shape": [-1, -2], "data_offsets": [0, 2]}}, bytes(2), "shape and data_offsets of c"),
        ({"c": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]}}, bytes(4), "a tensor at byte 0 of the data"),
        ({"c": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}, bytes(3), "bytes, found"),
        ({"c": "text"}, b"", "shape and data_offsets of c"),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_refused(folder, header, data, message):
    with_header(folder / "two.safetensors", header, data)
    assert message in refused(folder)


def test_a_huge_header_is_not_read(folder):
    (folder / "two.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert f"found one of {2**62} bytes in 10" in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    assert "weight_map" in refused(folder)
