"""The golden checkpoints in every dtype and layout, bit for bit as a naive conversion in numpy gives them."""

import json

import numpy as np
import pytest
import torch
from naive_conversion import GROUP_SIZES, naive_tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grok1.conversion.convert import convert
from grok1.conversion.layout import as_bytes


CASES = [(dtype, layout) for dtype in ("bfloat16", "float32") for layout in ("hub", "fused", "hpcai", "keyfan")]
CASES += [("int8", "hub")]
COMPANIONS = {
    *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors.index.json", "SHA256SUMS"),
    *("configuration_grok1.py", "modeling_grok1.py"),
}


@pytest.mark.parametrize(("dtype", "layout"), CASES)
@pytest.mark.parametrize("name", ["tiny-1", "tiny-8"])
def test_every_tensor_bit_for_bit(golden, tmp_path, name, dtype, layout):
    out = tmp_path / "out"
    group_size = GROUP_SIZES[name] if dtype == "int8" else None
    options = {"group_size": group_size, "no_tokenizer": True, "max_shard_size": "100KB"}
    convert(golden / name, out, dtype=dtype, layout=layout, **options)
    expected = naive_tensors(golden / name, dtype, layout)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118
                assert index["weight_map"][key] == shard
                assert key not in found
                found[key] = file.get_tensor(key)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    torch_dtypes = {np.uint16: torch.bfloat16, np.float32: torch.float32}
    torch_dtypes |= {np.int32: torch.int32, np.int64: torch.int64}
    for key, tensor in found.items():
        value = np.ascontiguousarray(expected[key])
        assert tensor.dtype == torch_dtypes[value.dtype.type], key
        assert tuple(tensor.shape) == value.shape, key
        assert bytes(as_bytes(tensor)) == value.tobytes(), key
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())


def test_norms_and_routers_are_float32_in_every_precision(golden, tmp_path):
    for dtype in ("bfloat16", "float32", "int8", "int4"):
        group_size = 16 if dtype in ("int8", "int4") else None
        convert(golden / "tiny-1", tmp_path / dtype, dtype=dtype, group_size=group_size, no_tokenizer=True)
        (shard,) = (tmp_path / dtype).glob("*.safetensors")
        for name, tensor in load_file(shard).items():
            if "norm" in name or name.endswith("gate.weight"):
                assert tensor.dtype == torch.float32, name


def test_every_shard_is_the_file_that_the_library_would_write(golden, tmp_path):
    convert(golden / "tiny-8", tmp_path / "out", no_tokenizer=True, max_shard_size="300KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 5
    for shard in shards:
        save_file(load_file(shard), tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert shard.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("jobs", [1, 3, 16])
def test_the_number_of_workers_changes_nothing(golden, tmp_path, jobs):
    for name, count in (("a", 2), ("b", jobs)):
        convert(golden / "tiny-1", tmp_path / name, no_tokenizer=True, jobs=count, max_shard_size="100KB")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


@pytest.mark.parametrize("form", ["above", "ckpt-0", "ckpt", "files"])
def test_all_forms_of_a_checkpoint_folder(golden, tmp_path, form):
    source = tmp_path / "source"
    inner = source if form == "files" else source / ("ckpt" if form == "ckpt" else "ckpt-0")
    inner.mkdir(parents=True)
    for path in (golden / "tiny-1" / "ckpt-0").iterdir():
        (inner / path.name).write_bytes(path.read_bytes())
    (source / "config.json").write_bytes((golden / "tiny-1" / "config.json").read_bytes())
    convert(inner if form == "ckpt-0" else source, tmp_path / "out", no_tokenizer=True)
    convert(golden / "tiny-1", tmp_path / "expected", no_tokenizer=True)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.read_bytes() == (tmp_path / "expected" / shard.name).read_bytes()


def test_the_folder_is_whole_and_has_nothing_else(golden, tmp_path):
    convert(golden / "tiny-1", tmp_path / "out", no_tokenizer=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    code = {name for name in names if name.endswith(".py")}
    assert names == COMPANIONS | code | {"model-00001-of-00001.safetensors"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4"])
def test_the_config_says_what_was_written(golden, tmp_path, dtype):
    packed = dtype in ("int8", "int4")
    group_size = {"int8": 2, "int4": 16}.get(dtype)
    convert(golden / "tiny-8", tmp_path / "out", dtype=dtype, group_size=group_size, no_tokenizer=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == ("float32" if dtype == "float32" else "bfloat16")
    assert config["architectures"] == ["Grok1ForCausalLM"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config["auto_map"])
    assert config["num_experts"] == config["num_local_experts"] == 8
    assert ("quantization_config" in config) == packed
    if packed:
        assert config["quantization_config"]["quant_method"] == "compressed-tensors"
        (scheme,) = config["quantization_config"]["config_groups"].values()
        assert (scheme["weights"]["num_bits"], scheme["weights"]["group_size"]) == (int(dtype[3:]), group_size)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 0)


def test_the_tokenizer_comes_along(golden, tmp_path, assets):
    config = json.loads((golden / "tiny-1" / "config.json").read_text())
    # A vocabulary that holds the release's tokenizer, on a checkpoint too small for it.
    with pytest.raises(ValueError, match="131072"):
        convert(golden / "tiny-1", tmp_path / "out", tokenizer=assets / "tokenizer.model")
    assert config["vocab_size"] < 131072
    assert not (tmp_path / "out").exists()
