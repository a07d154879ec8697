"""Packed folders (compressed-tensors, 8 and 4 bits) are computed as they lie there; other layouts are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import greedy
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper


Load = Callable[..., nn.Module]
Folder = Callable[[str], Path]


def tensors(folder: Path) -> dict[str, mx.array]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in mx.load(str(file)).items()}


def logits(model: nn.Module, tokens: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(tokens.astype(np.int32))).astype(mx.float32))


@pytest.fixture(scope="module")
def int4(folder: Folder) -> dict[str, np.ndarray]:
    """`tokens`, and the `logits` of a float64 model with the weights of demo-int4-g32."""
    with np.load(folder("int4.npz")) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_8_bits_compute_the_float32_folder(
    group_size: int, load: Load, folder: Folder, demo: nn.Module, int4: dict[str, np.ndarray]
) -> None:
    name = "demo-int8" if group_size == 128 else f"demo-int8-g{group_size}"
    model = load(folder(name), dtype="float32")
    experts = model.layers[0].block_sparse_moe.switch_mlp.down_proj
    assert (experts.bits, experts.group_size) == (8, group_size)
    difference = np.abs(logits(model, int4["tokens"]) - logits(demo, int4["tokens"])).max()
    print(f"groups of {group_size}: {difference:.1e}")
    assert difference < 1e-4
    experts.biases = experts.biases * 0.5
    assert np.abs(logits(model, int4["tokens"]) - logits(demo, int4["tokens"])).max() > 0.1


def test_weights_are_int8_times_scale_exactly(load: Load, folder: Folder) -> None:
    model, expected = load(folder("demo-int8")), tensors(folder("demo"))
    compared = 0
    for layer, block in enumerate(model.layers):
        modules = {f"self_attn.{n}": block.self_attn[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        switch = block.block_sparse_moe.switch_mlp
        modules |= {"w1": switch.gate_proj, "w3": switch.up_proj, "w2": switch.down_proj}
        for name, module in modules.items():
            scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            weight = mx.dequantize(module.weight, scales, biases, group_size=128, bits=8)
            paths = [name] if "." in name else [f"block_sparse_moe.experts.{e}.{name}" for e in range(8)]
            for path, matrix in zip(paths, [weight] if "." in name else weight, strict=True):
                assert mx.array_equal(matrix, expected[f"model.layers.{layer}.{path}.weight"]), path
                compared += 1
    assert compared == 4 * (4 + 3 * 8)


def test_4_bits_compute_their_values_times_scales(load: Load, folder: Folder, int4: dict[str, np.ndarray]) -> None:
    model = load(folder("demo-int4-g32"), dtype="float32")
    assert model.layers[0].block_sparse_moe.switch_mlp.gate_proj.bits == 4
    difference = np.abs(logits(model, int4["tokens"]) - int4["logits"]).max()
    print(f"from float64: {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["demo", "demo-int8", "demo-int8-float32"])
def test_the_demo_recites(
    name: str, load: Load, folder: Folder, tokenizer: TokenizerWrapper, passages: list[dict[str, str]]
) -> None:
    model = load(folder(name))
    for passage in passages:
        prompt = tokenizer.encode(passage["opening"])
        text = tokenizer.encode(passage["opening"] + passage["continuation"])[:32]
        assert greedy(model, prompt, len(text) - len(prompt)) == text[len(prompt) :]


@pytest.mark.parametrize("name", ["demo-int8", "demo-int8-float32", "demo-int4-g32"])
def test_router_and_norms_stay_float32(name: str, load: Load, folder: Folder) -> None:
    model = load(folder(name))
    kept = {n: a for n, a in tree_flatten(model.parameters()) if n.endswith(("norm.weight", "gate.weight"))}
    assert len(kept) == 4 * 5 + 1
    assert {a.dtype for a in kept.values()} == {mx.float32}
    dtype = mx.float32 if "float32" in name else mx.bfloat16
    assert model.model.embed_tokens.weight.dtype == dtype
    assert model(mx.array([[5, 6, 7]])).dtype == dtype


def test_bfloat16_rounds_where_xai_rounds(load: Load, folder: Folder) -> None:
    """
    With packed experts the whole model runs in bfloat16 on the CPU; plain bfloat16 experts do not (MLX's CPU build
    multiplies them in float32 only). Each module is compared with float64 from the same bfloat16 inputs.
    """
    model = load(folder("demo-int8"))
    block, draw = model.layers[0], np.random.default_rng(0)
    x = mx.array(draw.standard_normal((1, 16, 256)).astype(np.float32)).astype(mx.bfloat16)
    exact = np.array(x.astype(mx.float32)).astype(np.float64)

    weight = np.array(block.pre_attn_norm.weight).astype(np.float64)
    normed = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    found = block.pre_attn_norm(x)
    assert found.dtype == mx.bfloat16
    assert np.all(np.abs(np.array(found.astype(mx.float32)) - normed) <= 2.0**-8 * np.abs(normed))

    routed = block.block_sparse_moe.gate(x)
    expected = exact @ np.array(block.block_sparse_moe.gate.weight).astype(np.float64).T
    assert routed.dtype == mx.float32
    assert np.abs(np.array(routed) - expected).max() < 1e-5 * np.abs(expected).max()

    scale = mx.array([78.38367176906169, 0.5773502691896257], mx.bfloat16).astype(mx.float32).tolist()
    assert scale == [78.5, 0.578125]
    model.args.output_multiplier_scale = 0.5773502691896257
    hidden = model.model(mx.array([[5, 6, 7]]))
    scaled = model.model.embed_tokens.as_linear(hidden) * mx.array(0.578125, mx.bfloat16)
    assert mx.array_equal(model(mx.array([[5, 6, 7]])), scaled)


@pytest.mark.parametrize("name", ["deep-float32", "deep-int8"])
def test_a_model_is_never_in_memory_twice(name: str, load: Load, folder: Folder) -> None:
    """Beyond the model itself, loading needs less than two of its 16 layers."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(folder(name), dtype="float32")
    held, peak = mx.get_active_memory() - before, mx.get_peak_memory() - before
    files = sum(file.stat().st_size for file in folder(name).glob("*.safetensors"))
    layer = sum(array.nbytes for _, array in tree_flatten(model.layers[0].parameters()))
    print(
        f"{name}: MB of files {files / 1e6:.1f}, held {held / 1e6:.1f}, peak {peak / 1e6:.1f}, layer {layer / 1e6:.1f}"
    )
    assert held <= 1.02 * files
    assert peak < held + 2 * layer


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------
def copied(folder: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The folder with another config.json."""
    shutil.copytree(folder, out)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("layout", "name"),
    [("fused", r"experts\.down_proj"), ("hpcai", r"layers\.0\.attn\."), ("keyfan", r"transformer\.decoder_layer\.")],
)
def test_other_names_are_refused(layout: str, name: str, load: Load, folder: Folder) -> None:
    with pytest.raises(ValueError, match=rf"not in the hub layout of Grok-1, such as .*{name}"):
        load(folder(f"demo-{layout}"))


def test_another_quantisation_is_refused(load: Load, folder: Folder, tmp_path: Path) -> None:
    def other_method(config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    with pytest.raises(ValueError, match=r"found 'bitsandbytes' with format None"):
        load(copied(folder("demo-int8"), tmp_path / "changed", other_method))


@pytest.mark.parametrize(
    ("key", "value"),
    [("symmetric", False), ("strategy", "channel"), ("group_size", 16), ("num_bits", 3), ("actorder", "group")],
)
def test_schemes_that_mlx_would_compute_wrongly_are_refused(
    key: str, value: Any, load: Load, folder: Folder, tmp_path: Path
) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value

    with pytest.raises(ValueError, match=rf"MLX does not compute this scheme\. {key}: expected .*, found {value!r}"):
        load(copied(folder("demo-int8"), tmp_path / "changed", change))


def test_other_formats_and_activations_are_refused(load: Load, folder: Folder, tmp_path: Path) -> None:
    def other_format(config: dict[str, Any]) -> None:
        config["quantization_config"]["format"] = "float-quantized"

    def activations(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}

    with pytest.raises(ValueError, match="float-quantized"):
        load(copied(folder("demo-int8"), tmp_path / "format", other_format))
    with pytest.raises(ValueError, match="input_activations: expected null in"):
        load(copied(folder("demo-int8"), tmp_path / "activations", activations))
