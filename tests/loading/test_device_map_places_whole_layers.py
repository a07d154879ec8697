"""Device maps: automatic ones keep decoder layers whole, count every byte, and give the logits of one device."""

import re

import pytest
import torch
from small_grok import prompt, save_small_grok
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.accelerate import _get_device_map, compute_module_sizes

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_grok(tmp_path_factory.mktemp("device-map"), intermediate_size=128)


@pytest.fixture(scope="module")
def one_device(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(prompt()).logits


@pytest.fixture(scope="module")
def released():
    """The 314B model without its weights."""
    with torch.device("meta"):
        return Grok1ForCausalLM._from_config(GrokConfig(), dtype=torch.bfloat16)


def bytes_on_each_device(model, device_map):
    sizes, used = compute_module_sizes(model, only_modules=False)[0], {}
    for name, device in device_map.items():
        used[device] = used.get(device, 0) + sizes[name]
    return used


@pytest.mark.parametrize("mode", ["auto", "balanced", "balanced_low_0", "sequential"])
@pytest.mark.parametrize(("gpus", "gigabytes"), [(8, 80), (4, 80), (16, 48), (5, 141)])
def test_automatic_maps_of_the_released_model_never_split_a_layer(released, mode, gpus, gigabytes):
    budget = dict.fromkeys(range(gpus), gigabytes * GB) | {"cpu": 2000 * GB}
    device_map = _get_device_map(released, mode, dict(budget), None)
    split = [name for name in device_map if re.match(r"model\.layers\.\d+\.", name)]
    assert split == []
    assert {f"model.layers.{layer}" for layer in range(64)} <= set(device_map)
    used = bytes_on_each_device(released, device_map)
    assert sum(used.values()) == compute_module_sizes(released)[0][""]
    assert all(used.get(gpu, 0) <= gigabytes * GB for gpu in range(gpus))
    assert device_map["lm_head"] == device_map["model.embed_tokens"]
    assert used.get("cpu", 0) == 0 or gigabytes < 141 or mode == "balanced_low_0"


def test_eight_gpus_of_80_gb_hold_the_released_model_in_bfloat16_only_with_the_cpus_help(released):
    device_map = _get_device_map(released, "auto", dict.fromkeys(range(8), 80 * GB) | {"cpu": 2000 * GB}, None)
    # A layer is 9.84 GB, so a GPU of 80 GB holds eight; the first one has the embedding, and owes a layer of room to
    # those that visit from the CPU.
    assert compute_module_sizes(released)[0]["model.layers.0"] == pytest.approx(9.84e9, rel=0.001)
    on_cpu = [name for name, device in device_map.items() if device == "cpu" and name.startswith("model.layers.")]
    assert on_cpu == ["model.layers.62", "model.layers.63"]


@pytest.mark.parametrize(
    "quantization",
    [None, BitsAndBytesConfig(load_in_8bit=True), BitsAndBytesConfig(load_in_4bit=True)],
    ids=["as-is", "bnb-8bit", "bnb-4bit"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sizes_before_loading_are_the_bytes_after_loading(folder, dtype, quantization):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    really = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    with torch.device("meta"):
        planned = Grok1ForCausalLM._from_config(loaded.config, dtype=dtype)
    quantizer = getattr(loaded, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.preprocess_model(model=planned, dtype=dtype, device_map=None, checkpoint_files=None)
    expected = compute_module_sizes(planned, quantizer)[0][""]
    # bitsandbytes does not count its scales beforehand
    assert really == expected if quantization is None else expected == pytest.approx(really, rel=0.02)


REST = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
MAPS = {
    "auto": ("auto", {"cpu": "2MB"}),
    "balanced": ("balanced", {"cpu": "2MB"}),
    "by turns": ({**REST, **{f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(4)}}, None),
    "head on disk": ({**REST, "model.embed_tokens": "disk", "lm_head": "disk", "model.layers": "cpu"}, None),
    "all on disk": ({"": "disk"}, None),
}


@pytest.mark.parametrize("layout", ["fused", "linear"])
@pytest.mark.parametrize("name", MAPS)
def test_a_map_over_several_devices_gives_the_logits_of_one(folder, one_device, tmp_path, name, layout):
    device_map, max_memory = MAPS[name]
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, max_memory=max_memory, offload_folder=tmp_path, experts_layout=layout
    )
    assert "disk" in model.hf_device_map.values()
    if name in ("auto", "balanced"):
        assert not [key for key in model.hf_device_map if re.match(r"model\.layers\.\d+\.", key)]
        assert "cpu" in model.hf_device_map.values()
    with torch.no_grad():
        logits = model(prompt()).logits
    torch.testing.assert_close(logits, one_device, rtol=0, atol=1e-4)
    # Linear experts are read where they lie; fused ones have to be written in their fused form first.
    assert bool(list(tmp_path.iterdir())) == (layout == "fused" and name != "head on disk")


@pytest.mark.parametrize(
    "device_map",
    [{"model": "cpu", "lm_head": "disk"}, {**REST, "model.layers": "cpu", "model.embed_tokens": "disk"}],
    ids=["head apart", "embedding apart"],
)
def test_a_map_that_separates_the_embedding_from_its_tied_head_is_refused_by_name(folder, device_map):
    with pytest.raises(ValueError, match=r"device_map.*model\.embed_tokens\.weight.*lm_head\.weight"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
