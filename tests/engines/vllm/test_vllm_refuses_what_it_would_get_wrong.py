"""Folders, head sizes and attention backends that vLLM would serve wrongly are refused in one sentence."""

from types import SimpleNamespace

import pytest
import torch
from engines import DATA

from grok1.conversion.names import hub_tensors
from grok1.engines.vllm import checks
from modeling_grok1.configuration_grok1 import GrokConfig


@pytest.fixture
def config() -> GrokConfig:
    return GrokConfig.from_pretrained(DATA / "tiny-1-float32")


def load(config: GrokConfig, names: list[str], missing: set[str] | None = None) -> list[str]:
    """What the loader lets through of a checkpoint with these names."""
    if missing is None:
        missing = checks.modules_with_weights(config, "hub") - {"lm_head"}
    return [name for name, _ in checks.checked([(name, torch.empty(0)) for name in names], config, missing)]


def test_the_hub_layout_passes_in_every_format(config):
    names = list(hub_tensors(config, "hub"))
    assert load(config, names) == names
    packed = [
        name.replace(".weight", suffix)
        for name in names
        for suffix in (
            (".weight_packed", ".weight_scale", ".weight_shape") if "proj" in name or ".w" in name else (".weight",)
        )
    ]
    assert load(config, packed) == packed


@pytest.mark.parametrize("layout", ["fused", "hpcai", "keyfan"])
def test_another_layout_is_named(layout, config):
    with pytest.raises(ValueError, match=f"in the layout '{layout}'.*grok1 (convert|adopt)"):
        load(config, list(hub_tensors(config, layout)))


def test_a_missing_weight_is_named(config):
    names = [
        name for name in hub_tensors(config, "hub") if name != "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    ]
    with pytest.raises(
        ValueError, match=r"1 of Grok-1's modules, such as model\.layers\.1\..*experts\.3\.w2: complete"
    ):
        load(config, names)


def test_a_later_load_may_bring_some_of_the_weights(config):
    """As a trainer sends them to a running engine."""
    assert load(config, ["model.norm.weight"], missing=set()) == ["model.norm.weight"]


def backend(name: str, sizes: list[int]) -> SimpleNamespace:
    return SimpleNamespace(
        get_name=lambda: name,
        get_supported_head_sizes=lambda: sizes,
        supports_head_size=lambda size: not sizes or size in sizes,
    )


@pytest.mark.parametrize(("head_dim", "sizes", "expected"), [(128, [], 128), (8, [32, 64], 32), (64, [32, 64], 64)])
def test_heads_are_padded_to_the_next_size(head_dim, sizes, expected, monkeypatch):
    monkeypatch.setattr(checks, "get_attn_backend", lambda *_: backend("CPU_ATTN", sizes))
    assert checks.kernel_head_dim(head_dim, None) == expected


def test_heads_larger_than_every_size_are_refused(monkeypatch):
    monkeypatch.setattr(checks, "get_attn_backend", lambda *_: backend("CPU_ATTN", [32, 64]))
    with pytest.raises(ValueError, match=r"heads of 128 .* CPU_ATTN, whose head sizes are \[32, 64\]"):
        checks.kernel_head_dim(128, None)


@pytest.mark.parametrize("name", ["TURBOQUANT", "ULTRAQUANT", "ROCM_ATTN", "A_NEW_ONE"])
def test_a_backend_that_drops_the_cap_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is not known to apply Grok-1's soft-cap"):
        checks.check_soft_cap(SimpleNamespace(attn_backend=backend(name, [])))
    checks.check_soft_cap(SimpleNamespace(attn_backend=backend("FLASH_ATTN", [])))


@pytest.mark.parametrize("module", ["flex_attention.FlexAttentionImpl", "hpc_attn.HpcAttentionImpl"])
def test_the_other_backends_refuse_it_themselves(module):
    """What the table in the model's file rests on."""
    import importlib
    import inspect

    file, _, name = module.partition(".")
    source = inspect.getsource(importlib.import_module(f"vllm.v1.attention.backends.{file}"))
    assert name in source
    assert "NotImplementedError" in source.partition("logits_soft_cap is not None")[2][:200]


@pytest.mark.parametrize("file", ["turboquant_attn", "ultraquant_attn"])
def test_what_is_refused_does_drop_it(file):
    """The parameter is taken and never read: the reason for a list of backends."""
    from pathlib import Path

    import vllm

    source = (Path(vllm.__file__).parent / "v1" / "attention" / "backends" / f"{file}.py").read_text()
    assert source.count("logits_soft_cap") == 1


def test_the_old_int8_format_names_the_new_one(tmp_path, config):
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config.quantization_config = {"quant_method": "grok1_int8"}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no kernels for the format 'grok1_int8'.*--dtype int8"):
        ModelConfig(model=str(tmp_path), skip_tokenizer_init=True)


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_another_activation_is_refused_by_the_configuration(act, config):
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with pytest.raises(ValueError, match="hidden_act"):
        ModelConfig(
            model=str(DATA / "tiny-1-float32"), skip_tokenizer_init=True, hf_overrides={"hidden_act": act}
        ).hf_config.validate_architecture()
