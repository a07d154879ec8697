"""llama.cpp's converter reads a hub folder as it is: every tensor arrives, with its values, and no other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_names import gguf_place, read_gguf
from runtime import Runtime

from grok1.conversion.adopt import adopt
from grok1.conversion.convert import convert


DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo"
TENSORS = 3 + 4 * 12  # of the demo: embedding, head and final norm, and twelve in each layer


def compare(folder, file, read_tensors, differs) -> int:
    """Every tensor of `folder` against its place in `file`; returns how many tensors `file` holds."""
    stored, seen = read_gguf(file), set()
    hub_tensors = read_tensors(folder)
    for name, tensor in hub_tensors.items():
        place, expert = gguf_place(name)
        kind, values = stored[place]
        seen.add((place, expert))
        found = values if expert is None else values[expert]
        assert found.shape == tensor.shape, name
        assert not differs(kind, tensor.float(), found), name
    experts = {place for place, expert in seen if expert is not None}
    assert len(seen) == len(hub_tensors)
    assert {place for place, _ in seen} == set(stored)
    assert seen == {(place, e) for place in experts for e in range(8)} | {(p, e) for p, e in seen if e is None}
    return len(stored)


def unequal(kind, expected, found) -> bool:
    return not torch.equal(expected, found)


def beyond_half_a_step(kind, expected, found) -> bool:
    """q8_0 rounds to int8 (half a step) and the step itself to float16 (at most 127 * 2^-11 of a step)."""
    if kind == GGMLQuantizationType.F32:
        return unequal(kind, expected, found)
    assert kind == GGMLQuantizationType.Q8_0
    step = expected.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (expected - found).unflatten(-1, (-1, 32)).abs()
    return bool((error > step * (0.5 + 127 * 2**-11)).any())


@pytest.mark.parametrize("max_shard_size", ["5GB", "2MiB", "1MB", "300KB"])
def test_float32_is_exact_however_it_is_sharded(max_shard_size, hub, gguf, read_tensors):
    folder = hub("float32", max_shard_size)
    assert len(list(folder.glob("*.safetensors"))) == {"5GB": 1, "2MiB": 15, "1MB": 37, "300KB": 114}[max_shard_size]
    assert compare(folder, gguf(folder, "f32"), read_tensors, unequal) == TENSORS


def test_bfloat16_is_exact_as_it_is_stored(hub, gguf, read_tensors):
    file = gguf(hub("bfloat16"), "bf16")
    assert compare(hub("bfloat16"), file, read_tensors, unequal) == TENSORS
    kinds = {kind for kind, _ in read_gguf(file).values()}
    assert kinds == {GGMLQuantizationType.BF16, GGMLQuantizationType.F32}


def test_q8_0_is_within_half_a_step_and_leaves_norms_and_routers_alone(hub, gguf, read_tensors):
    file = gguf(hub("float32"), "q8_0")
    assert compare(hub("float32"), file, read_tensors, beyond_half_a_step) == TENSORS
    for name, (kind, _) in read_gguf(file).items():
        exact = "norm" in name or "ffn_gate_inp" in name
        assert kind == (GGMLQuantizationType.F32 if exact else GGMLQuantizationType.Q8_0), name


def test_the_scalars_arrive(hub, gguf):
    config = json.loads((hub("float32") / "config.json").read_text())
    fields = GGUFReader(gguf(hub("float32"), "f32")).fields
    found = {name.removeprefix("grok."): field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "grok"
    for key, value in {
        "embedding_scale": config["embedding_multiplier_scale"],
        "logit_scale": config["output_multiplier_scale"],
        "attention.output_scale": config["attn_output_multiplier"],
        "attn_logit_softcapping": 30.0,
        "router_logit_softcapping": 0.0,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }.items():
        assert found[key] == pytest.approx(value, rel=1e-7), key
    for key, value in {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 256,
        "feed_forward_length": 256,
        "expert_feed_forward_length": 256,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "expert_count": 8,
        "expert_used_count": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }.items():
        assert found[key] == value, key


def test_a_folder_saved_in_many_shards_goes_through_adopt(hub, gguf, load, read_tensors, tmp_path):
    """Transformers does not write the layers in order, which the converter needs; `grok1 adopt` puts them in order."""
    load(hub("float32")).save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    for file in hub("float32").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "saved")
    adopt(tmp_path / "saved", tmp_path / "adopted")
    assert compare(hub("float32"), gguf(tmp_path / "adopted", "f32"), read_tensors, unequal) == TENSORS


def test_an_int8_folder_is_exact(hub, gguf, read_tensors, tmp_path):
    """Packed as compressed-tensors packs it, with groups of 32, it is dequantised to float32(int8 x scale)."""
    convert(DEMO, tmp_path / "int8", dtype="int8", group_size=32)
    found, expected = read_gguf(gguf(tmp_path / "int8", "f32")), read_gguf(gguf(hub("float32"), "f32"))
    assert found.keys() == expected.keys() - {"output.weight"}
    assert [name for name in found if not torch.equal(found[name][1], expected[name][1])] == []


def test_the_fused_layout_loses_its_experts_and_does_not_load(hub, gguf):
    """The converter collects experts by name, waits for as many as the hub layout has, and drops these two a layer."""
    file = gguf(hub("bfloat16", layout="fused"), "bf16")
    assert not [name for name in read_gguf(file) if "exps" in name]
    with pytest.raises(ValueError, match="Failed to load model"):
        Runtime(file)
