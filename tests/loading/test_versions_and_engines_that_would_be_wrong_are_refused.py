"""The model's code refuses versions of Transformers that it was not tested with, and vLLM's generic backend."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import AutoModel, AutoModelForCausalLM

import modeling_grok1


CODE = Path(modeling_grok1.__file__).parent


def run(name):
    """The file as a module of its own, as Transformers runs a folder's code."""
    spec = importlib.util.spec_from_file_location(f"elsewhere.{name}", CODE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize("found", ["5.22.1", "5.24.0", "6.0.0.dev0", "4.57.0"])
def test_another_transformers_is_refused_before_anything_else_runs(monkeypatch, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    monkeypatch.delenv("GROK1_UNTESTED_TRANSFORMERS", raising=False)
    with pytest.raises(ImportError) as refusal:
        run("loading_grok1")
    assert f"transformers {found}" in str(refusal.value)
    assert 'pip install "transformers==5.23.*"' in str(refusal.value)


def test_the_refusal_is_lifted_for_the_one_version_that_the_environment_names(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.24.1")
    monkeypatch.setenv("GROK1_UNTESTED_TRANSFORMERS", "5.24.0")
    with pytest.raises(ImportError, match=r"GROK1_UNTESTED_TRANSFORMERS=5\.24\.1"):
        run("loading_grok1")
    monkeypatch.setenv("GROK1_UNTESTED_TRANSFORMERS", "5.24.1")
    # Alone, the file goes no further than the files beside it.
    with pytest.raises(ModuleNotFoundError, match=r"elsewhere"):
        run("loading_grok1")


def test_the_configuration_alone_runs_with_the_versions_that_engines_bring(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.19.0")
    assert run("configuration_grok1").GrokConfig().to_dict() == modeling_grok1.GrokConfig().to_dict()


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_vllms_generic_backend_is_refused(small_config, auto_class):
    small_config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"SiLU in every expert, .* use vLLM 0\.24\.0"):
        auto_class.from_config(small_config)
