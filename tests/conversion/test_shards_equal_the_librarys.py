"""Shards written in place from a plan against files that the safetensors library wrote from memory."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from grok1.conversion.layout import TORCH_DTYPE, as_bytes
from grok1.conversion.names import HubTensor, hub_tensors
from grok1.conversion.release import release_sizes
from grok1.conversion.shards import index_text, make_shard, plan_shards
from modeling_grok1 import Grok1ForCausalLM, GrokConfig
from modeling_grok1.sizes_grok1 import parse_size


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
dtypes = st.sampled_from(["int64", "float32", "int32", "bfloat16", "int8"])
tensor_sets = st.dictionaries(names, st.tuples(shapes, dtypes), min_size=1)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(tensor_sets)
def test_a_shard_is_byte_for_byte_the_librarys(tmp_path_factory, described):
    folder = tmp_path_factory.mktemp("library")
    described.pop("__metadata__", None)
    values = {name: torch.randn(shape).to(TORCH_DTYPE[dtype]) for name, (shape, dtype) in described.items()}
    if not values:
        return
    save_file(values, folder / "library.safetensors", metadata={"format": "pt"})
    shard = make_shard("ours", [HubTensor(name, shape, dtype, ()) for name, (shape, dtype) in described.items()])
    ours = bytearray(shard.nbytes)
    ours[: len(shard.header)] = shard.header
    for name, value in values.items():
        data = as_bytes(value)
        ours[shard.offsets[name] : shard.offsets[name] + len(data)] = data
    assert bytes(ours) == (folder / "library.safetensors").read_bytes()
    (folder / "ours.safetensors").write_bytes(ours)
    with safe_open(folder / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value)


@pytest.mark.parametrize("max_shard_size", [1, 10**8, 5 * 10**9, 10**15])
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_the_plan_of_the_release(layout, max_shard_size):
    tensors = hub_tensors(release_sizes(), layout)
    shards = plan_shards(tensors.values(), max_shard_size)
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    place = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
    assert sorted(place) == sorted(tensors)
    assert sum(len(shard.tensors) for shard in shards) == len(tensors)
    # In the order of the table, so in layer order, and the final norm at the very end.
    order = [place[name] for name in tensors]
    assert order == sorted(order)
    assert place["model.norm.weight"] == shards[-1].name
    for shard in shards:
        assert len(shard.tensors) == 1 or sum(tensor.nbytes for tensor in shard.tensors) <= max_shard_size
    if max_shard_size == 10**15:
        assert len(shards) == 1


@pytest.mark.parametrize("max_shard_size", [2 * 10**9, 5 * 10**9, 20 * 10**9])
def test_the_last_expert_is_followed_by_a_tensor_that_is_none(max_shard_size):
    """llama.cpp's converter merges the experts of a layer when the next tensor arrives, in the order of the files."""
    shards = plan_shards(hub_tensors(release_sizes()).values(), max_shard_size)
    in_file_order = [tensor.name for shard in shards for tensor in shard.tensors]
    by_name = [name for shard in shards for name in sorted(tensor.name for tensor in shard.tensors)]
    for order in (in_file_order, by_name):
        last = max(i for i, name in enumerate(order) if ".experts." in name)
        assert any(".experts." not in name for name in order[last + 1 :])
    assert by_name[-1] == "model.norm.weight"


def test_the_index_is_the_one_of_save_pretrained(tmp_path):
    config = GrokConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
    )
    Grok1ForCausalLM(config).save_pretrained(tmp_path, max_shard_size="10KB")
    written = (tmp_path / "model.safetensors.index.json").read_text()
    saved = json.loads(written)
    ours = json.loads(index_text(plan_shards(hub_tensors(config, dtype="float32").values(), 10_000)))
    assert ours["metadata"] == saved["metadata"]
    assert set(ours["weight_map"]) == set(saved["weight_map"])
    # The form: indentation, order and the newline at the end.
    assert written == json.dumps(saved, indent=2, sort_keys=True) + "\n"
    text = index_text(plan_shards(hub_tensors(config, dtype="float32").values(), 10_000))
    assert text == json.dumps(ours, indent=2, sort_keys=True) + "\n"


def test_the_index_of_the_release_counts_its_parameters_once():
    for dtype in ("bfloat16", "int8", "int4"):
        shards = plan_shards(hub_tensors(release_sizes(), dtype=dtype).values(), 5 * 10**9)
        assert json.loads(index_text(shards))["metadata"]["total_parameters"] == 315_684_820_992


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("4GiB", 2**32),
        ("800mb", 8 * 10**8),
        ("1.5 KB", 1500),
        (7, 7),
        ("12", 12),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5XB", "5 G B", "1e9", 0, "0.1B"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="expected a size such as 5GB"):
        parse_size(text)
