"""W8A16 and W4A16 folders of this package: vLLM's loader fills every parameter with the right bytes. Its kernels for
them need a GPU, so only here they are replaced by nothing."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
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


PACKED = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"))


class NoKernel:
    def __init__(self, *args, **kwargs):
        pass


FORMATS = ["w8a16-128", "w8a16-32", "w4a16-128", "w4a16-32"]


@pytest.fixture
def config(request, free_port):
    """vLLM's configuration of a folder in the format of the parameter, in an environment of one rank."""
    folder = DATA / f"wide-{request.param}"
    config = EngineArgs(
        model=str(folder), dtype="bfloat16", skip_tokenizer_init=True, max_model_len=64
    ).create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port}", 0, "gloo")
        initialize_model_parallel()
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


def checkpoint_of(config) -> dict[str, torch.Tensor]:
    (file,) = Path(config.model_config.model).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("config", FORMATS, indirect=True)
def test_every_parameter_has_its_bytes(config, monkeypatch):
    backend = (WNA16MoEBackend.MARLIN, None)
    monkeypatch.setattr(compressed_tensors_wNa16, "choose_mp_linear_kernel", lambda config: NoKernel)
    monkeypatch.setattr(compressed_tensors_moe_wna16, "select_wna16_moe_backend", lambda **options: backend)
    model = initialize_model(config)
    checkpoint = checkpoint_of(config)
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


@pytest.mark.parametrize("config", FORMATS, indirect=True)
def test_the_unpacked_values_are_the_weights(config):
    """By compressed-tensors' own function; what is left is the rounding to 8 and 4 bits."""
    weights = config.model_config.hf_config.quantization_config["config_groups"]["group_0"]["weights"]
    bits, group = weights["num_bits"], weights["group_size"]
    packed = checkpoint_of(config)
    (file,) = (DATA / "wide-float32").glob("*.safetensors")
    matrices = {name: tensor for name, tensor in load_file(file).items() if name.endswith(PACKED)}
    assert len(matrices) == 4 * (4 + 3 * 8)
    for name, exact in matrices.items():
        module = name.removesuffix(".weight")
        values = unpack_from_int32(packed[f"{module}.weight_packed"], bits, exact.shape)
        scale = packed[f"{module}.weight_scale"].float()[..., None]
        found = (values.view(len(exact), -1, group).float() * scale).view_as(exact)
        assert (found - exact).norm() <= {8: 0.012, 4: 0.15}[bits] * exact.norm()


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
    ("config", "message"), [("w8a16-128", "WNA16 linear"), ("w4a16-32", "WNA16 MoE")], indirect=["config"]
)
def test_a_cpu_without_the_kernels_says_so(config, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        initialize_model(config)
