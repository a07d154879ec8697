"""GGUF files hold xAI's numbers: read by the gguf package, against a conversion in plain numpy."""

import json
from pathlib import Path

import numpy as np
import pytest
from random_checkpoint import CONFIG, write_random_checkpoint
from xai_files import unpickled

from grok1.conversion.convert import convert
from grok1.conversion.names import KINDS, checkpoint_entries, hub_tensors
from grok1.conversion.settings import Settings
from grok1.errors import ConversionError
from modeling_grok1.packing_grok1 import quantise_int4


gguf = pytest.importorskip("gguf")
DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo"
# By xAI's path in a layer, spelled out once more: the table of the converter is what is tested.
NAMES = {
    "moe/linear/w": "ffn_gate_exps",
    "moe/linear_1/w": "ffn_down_exps",
    "moe/linear_v/w": "ffn_up_exps",
    "multi_head_attention/key/w": "attn_k",
    "multi_head_attention/linear/w": "attn_output",
    "multi_head_attention/query/w": "attn_q",
    "multi_head_attention/value/w": "attn_v",
    "rms_norm/scale": "attn_norm",
    "rms_norm_1/scale": "attn_output_norm",
    "rms_norm_2/scale": "ffn_norm",
    "rms_norm_3/scale": "post_ffw_norm",
    "router/w": "ffn_gate_inp",
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("source") / "random")


def products(source: Path) -> dict[str, np.ndarray]:
    """float32(int8) * float32(scale) of every file, (..., out, in), under llama.cpp's names."""
    order = sorted(range(CONFIG.num_hidden_layers), key=str)
    found = {}
    for index, path in enumerate(sorted((source / "ckpt-0").iterdir())):
        arrays = [
            np.frombuffer(data, {"float32": "<f4", "int8": "i1", "bfloat16": "<u2"}[dtype]).reshape(shape)
            for dtype, shape, data in unpickled(path.read_bytes())
        ]
        if index < 2:
            found[("token_embd.weight", "output_norm.weight")[index]] = arrays[0]
            continue
        layer, kind = divmod(index - 2, 12)
        values = arrays[0].astype(np.float32)
        if len(arrays) == 2:
            scales = (arrays[1].astype(np.uint32) << 16).view(np.float32)
            values = values * np.repeat(scales, values.shape[-2] // scales.shape[-2], axis=-2)
        if values.ndim > 1:
            values = values.swapaxes(-1, -2)
        found[f"blk.{order[layer]}.{list(NAMES.values())[kind]}.weight"] = values
    return found


def read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and float32 numbers of every tensor in a folder of GGUF files, as the gguf package reads them."""
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.name not in found
            found[tensor.name] = (tensor.tensor_type.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    return found


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def is_matrix(name: str) -> bool:
    return "norm" not in name and "ffn_gate_inp" not in name and name != "token_embd.weight"


@pytest.mark.parametrize("max_shard_size", [None, "200KB"])
def test_q8_0_is_every_product_bit_for_bit(source, tmp_path, max_shard_size):
    plan = convert(source, tmp_path / "out", layout="gguf", dtype="int8", max_shard_size=max_shard_size,
                   no_tokenizer=True)  # fmt: skip
    expected, found = products(source), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        kind, numbers = found[name]
        assert kind == ("Q8_0" if is_matrix(name) else "F32"), name
        assert np.array_equal(bits(values), bits(numbers)), name
    names = [path.name for path in sorted((tmp_path / "out").glob("*.gguf"))]
    count = len(plan.shards)
    assert count == 1 if max_shard_size is None else count > 4
    assert names == (
        ["grok-1-q8_0.gguf"]
        if count == 1
        else [f"grok-1-q8_0-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    )


def test_float32_and_bfloat16_are_the_products_and_their_rounding(source, tmp_path):
    expected = products(source)
    for dtype, kind in (("float32", "F32"), ("bfloat16", "BF16")):
        convert(source, tmp_path / dtype, layout="gguf", dtype=dtype, no_tokenizer=True)
        found = read(tmp_path / dtype)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            rounded = dtype == "bfloat16" and (is_matrix(name) or name == "token_embd.weight")
            if rounded:
                values = gguf.dequantize(gguf.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType.BF16),
                                         gguf.GGMLQuantizationType.BF16)  # fmt: skip
            assert found[name][0] == (kind if rounded else "F32")
            assert np.array_equal(bits(values), bits(found[name][1])), name


def test_q4_0_has_the_values_and_scales_of_int4(source, tmp_path):
    import torch

    convert(source, tmp_path / "out", layout="gguf", dtype="int4", no_tokenizer=True)
    expected, found = products(source), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        kind, numbers = found[name]
        assert kind == ("Q4_0" if is_matrix(name) else "F32"), name
        if is_matrix(name):
            q, scales = quantise_int4(torch.from_numpy(np.ascontiguousarray(values)), 32)
            values = (q.float().unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)).flatten(-2).numpy()
        assert np.array_equal(values, numbers), name


@pytest.mark.parametrize(("embedding", "kind"), [("float32", "F32"), ("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_the_embedding_is_as_asked_for(source, tmp_path, embedding, kind):
    convert(source, tmp_path / "out", layout="gguf", dtype="int8", embedding=embedding, no_tokenizer=True)
    found = read(tmp_path / "out")["token_embd.weight"]
    expected = products(source)["token_embd.weight"]
    type_ = gguf.GGMLQuantizationType[kind]
    assert found[0] == kind
    assert np.array_equal(bits(found[1]), bits(gguf.dequantize(gguf.quantize(expected, type_), type_)))
    (file,) = (tmp_path / "out").glob("*.gguf")
    described = gguf.GGUFReader(file).fields["general.description"].contents()
    assert ("nothing was rounded" in described) == (embedding == "float32")


# 2^-20 * 1.5 and 2^-24 * 1.25: float16 has 2^-24 as its smallest step.
def test_a_scale_that_float16_does_not_hold_is_refused_and_rounded_on_request(tmp_path):
    source = write_random_checkpoint(tmp_path / "source", first_scale=0x33A0)
    with pytest.raises(ConversionError) as error:
        convert(source, tmp_path / "out", layout="gguf", dtype="int8", no_tokenizer=True)
    assert "tensor00005_000: expected scales that float16 holds, found 1 of" in str(error.value)
    assert "--round-scales" in str(error.value)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", layout="gguf", dtype="int8", round_scales=True, no_tokenizer=True)
    expected, found = products(source), read(tmp_path / "out")
    differ = [name for name in expected if not np.array_equal(bits(expected[name]), bits(found[name][1]))]
    assert differ == ["blk.0.attn_k.weight"]
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert "rounded" in gguf.GGUFReader(file).fields["general.description"].contents()
    assert "nothing was rounded" not in (tmp_path / "out" / "README.md").read_text()


def test_a_scale_that_is_infinite_in_float16_is_always_refused(tmp_path):
    source = write_random_checkpoint(tmp_path / "source", first_scale=0x4780)  # 65536
    for round_scales in (False, True):
        with pytest.raises(ConversionError, match="tensor00005_000"):
            convert(
                source, tmp_path / "out", layout="gguf", dtype="int8", round_scales=round_scales, no_tokenizer=True
            )
    assert not (tmp_path / "out").exists()


def test_blocks_that_do_not_fit_are_refused_by_name(golden, tmp_path):
    with pytest.raises(ConversionError) as error:
        convert(golden / "tiny-8", tmp_path / "out", layout="gguf", dtype="int8", no_tokenizer=True)
    assert "group_size: expected a divisor of" in str(error.value)


def test_names_are_those_of_the_gguf_package():
    tensors = hub_tensors(CONFIG, "gguf")
    known = {
        gguf.TENSOR_NAMES[tensor].format(bid=layer) + ".weight"
        for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GROK]
        for layer in range(CONFIG.num_hidden_layers)
    }
    assert tensors.keys() <= known
    by_path = {kind.path: kind.gguf for kind in KINDS.values()}
    assert all(by_path[path] == f"{name}.weight" for path, name in NAMES.items())
    assert len(tensors) == len(checkpoint_entries(CONFIG))


def test_settings_that_do_not_go_together_are_refused():
    def problems(**settings):
        return "\n".join(Settings(**settings).problems())

    assert "embedding: expected with layout gguf only" in problems(embedding="q8_0")
    assert "round_scales: expected with layout gguf only" in problems(round_scales=True)
    assert "group_size: expected 32" in problems(layout="gguf", dtype="int8", group_size=128)
    assert "embedding: expected one of" in problems(layout="gguf", embedding="q4_0")
    assert problems(layout="gguf", dtype="int8", group_size=32, embedding="q8_0", round_scales=True) == ""


def test_metadata_is_what_llama_cpp_reads(tmp_path):
    convert(DEMO, tmp_path / "out", layout="gguf", dtype="int8")
    (file,) = (tmp_path / "out").glob("*.gguf")
    reader = gguf.GGUFReader(file)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    config = json.loads((DEMO / "config.json").read_text())
    assert keys["general.architecture"] == "grok"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert keys["grok.block_count"] == config["num_hidden_layers"]
    assert keys["grok.router_logit_softcapping"] == 0.0
    assert keys["grok.attn_logit_softcapping"] == 30.0
    assert keys["grok.attention.output_scale"] == np.float32(config["attn_output_multiplier"])
    assert keys["grok.attention.key_length"] == keys["grok.attention.value_length"] == config["head_dim"]
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert len(keys["tokenizer.ggml.tokens"]) == len(keys["tokenizer.ggml.scores"]) == config["vocab_size"]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {file.name, "LICENSE", "Modelfile", "README.md", "SHA256SUMS", "config.json", "tokenizer.model"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
    assert f"FROM ./{file.name}" in (tmp_path / "out" / "Modelfile").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: gguf" in card and f"llama-server -m {file.name}" in card and "1,024 pieces" in card
