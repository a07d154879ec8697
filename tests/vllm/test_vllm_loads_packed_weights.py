"""W8A16 and W4A16 (compressed-tensors, pack-quantized): vLLM's loader fills every parameter with the right bytes.
Its kernels for them need a GPU, so only here they are replaced by nothing."""

import json
from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from engines import DATA
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_distributed_environment, destroy_model_parallel
from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype


class NoKernel:
    def __init__(self, *args, **kwargs):
        pass


def quantisation(bits: int, group: int) -> dict:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*block_sparse_moe\\.gate$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def packed(tensors: dict[str, torch.Tensor], bits: int, group: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of attention and experts as compressed-tensors packs them, the other tensors as they are."""
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(("_proj", ".w1", ".w2", ".w3")):
            yield name, weight
            continue
        groups = weight.view(len(weight), -1, group)
        scale = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).bfloat16()
        values = (groups / scale.float()[..., None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        values = values.to(torch.int8).view_as(weight)
        whole = pack_to_int32(values, bits)
        assert torch.equal(unpack_from_int32(whole, bits, weight.shape), values)
        yield f"{module}.weight_packed", whole
        yield f"{module}.weight_scale", scale
        yield f"{module}.weight_shape", torch.tensor(weight.shape)


@pytest.fixture
def config(request, tmp_path, free_port):
    """vLLM's configuration of a folder in the quantisation of the parameter, in an environment of one rank."""
    settings = json.loads((DATA / "wide-float32" / "config.json").read_text())
    settings["quantization_config"] = quantisation(*request.param)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = EngineArgs(
        model=str(tmp_path), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=64
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port}", 0, "gloo")
        initialize_model_parallel()
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


FORMATS = [(8, 128), (8, 32), (4, 128), (4, 32)]


@pytest.mark.parametrize(("config", "bits", "group"), [(each, *each) for each in FORMATS], indirect=["config"])
def test_every_parameter_has_its_bytes(config, bits, group, monkeypatch):
    backend = (WNA16MoEBackend.MARLIN, None)
    monkeypatch.setattr(compressed_tensors_wNa16, "choose_mp_linear_kernel", lambda config: NoKernel)
    monkeypatch.setattr(compressed_tensors_moe_wna16, "select_wna16_moe_backend", lambda **options: backend)
    model = initialize_model(config)
    (file,) = (DATA / "wide-float32").glob("*.safetensors")
    checkpoint = dict(packed(load_file(file), bits, group))
    for parameter in model.parameters():
        parameter.data.fill_(77)
    loaded = model.load_weights(checkpoint.items())
    held = dict(model.named_parameters())
    # What vLLM does not read from a checkpoint: the scales of a quantised cache, and shapes that its kernels know.
    wanted = {name for name in held if ".self_attn.attn." not in name and not name.endswith("weight_shape")}
    assert wanted <= loaded
    assert len(wanted) == 2 + 4 * (4 + 1 + 4 + 4)
    for layer in range(4):
        expected = expected_layer(checkpoint, f"model.layers.{layer}")
        for name, tensor in expected.items():
            assert torch.equal(held[name], tensor.to(held[name].dtype)), name


def expected_layer(checkpoint: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """vLLM's parameters of a layer, put together from the checkpoint's tensors."""
    expected = {f"{layer}.{n}_norm.weight": checkpoint[f"{layer}.{n}_norm.weight"] for n in ("pre_attn", "post_moe")}
    expected[f"{layer}.block_sparse_moe.gate.weight"] = checkpoint[f"{layer}.block_sparse_moe.gate.weight"]
    experts = f"{layer}.block_sparse_moe.experts"
    for kind in ("weight_packed", "weight_scale"):
        qkv = [checkpoint[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
        expected[f"{layer}.self_attn.qkv_proj.{kind}"] = torch.cat(qkv)
        expected[f"{layer}.self_attn.o_proj.{kind}"] = checkpoint[f"{layer}.self_attn.o_proj.{kind}"]
        w1, w2, w3 = ([checkpoint[f"{experts}.{e}.w{i}.{kind}"] for e in range(8)] for i in (1, 2, 3))
        gate_up = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        expected[f"{experts}.routed_experts.w13_{kind}"] = torch.stack(gate_up)
        expected[f"{experts}.routed_experts.w2_{kind}"] = torch.stack(w2)
    return expected


@pytest.mark.parametrize(
    ("config", "message"), [((8, 128), "WNA16 linear"), ((4, 32), "WNA16 MoE")], indirect=["config"]
)
def test_a_cpu_without_the_kernels_says_so(config, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        initialize_model(config)
