"""A Transformers that is too old for the model is refused when it is built, a newer one is warned of, and so are
arguments that no forward pass knows. vLLM's generic backend is refused."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import modeling_grok1
from modeling_grok1 import Grok1ForCausalLM, versions_grok1


CODE = Path(modeling_grok1.__file__).parent
AUTO_CLASSES = [
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
]


def run(name, monkeypatch, found):
    """The file as a module of its own, as Transformers runs a folder's code, beside Transformers `found`."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    spec = importlib.util.spec_from_file_location(f"elsewhere.{name}", CODE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize("found", ["4.57.0", "5.19.0", "5.20.2"])
def test_an_older_transformers_is_refused_by_one_sentence(monkeypatch, found):
    versions = run("versions_grok1", monkeypatch, found)
    with pytest.raises(ImportError) as refusal:
        versions.check_transformers()
    assert f"needs transformers 5.21 to 5.24, found {found}" in str(refusal.value)
    assert 'pip install "transformers>=5.21,<5.25"' in str(refusal.value)


@pytest.mark.parametrize(("found", "warned"), [("5.21.0", 0), ("5.24.3", 0), ("5.25.0", 1), ("6.0.0.dev0", 1)])
def test_a_newer_transformers_is_warned_of_and_used(monkeypatch, found, warned):
    versions = run("versions_grok1", monkeypatch, found)
    warnings = []
    monkeypatch.setattr(versions.logger, "warning_once", warnings.append)
    versions.check_transformers()
    assert len(warnings) == warned
    assert all(f"found {found}" in text for text in warnings)


def test_the_configuration_alone_runs_with_the_versions_that_engines_bring(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.pipelines", raising=False)  # nothing to register with
    configuration = run("configuration_grok1", monkeypatch, "5.19.0")
    assert configuration.GrokConfig().to_dict() == modeling_grok1.GrokConfig().to_dict()


def test_the_package_is_imported_and_says_so_when_a_model_is_asked_for(monkeypatch, small_config):
    """As with Transformers 5.19: the configuration is registered, every Auto class refuses."""
    sentence = "needs transformers 5.21"
    monkeypatch.setattr(versions_grok1, "RELEASE", (5, 19))
    models = [auto_class._model_mapping for auto_class in AUTO_CLASSES]
    before = [dict(mapping._extra_content) for mapping in models]
    spec = importlib.util.spec_from_file_location(
        "elsewhere", CODE / "__init__.py", submodule_search_locations=[str(CODE)]
    )
    package = importlib.util.module_from_spec(spec)
    for mapping in models:
        monkeypatch.setattr(mapping, "_extra_content", {})
    try:
        spec.loader.exec_module(package)
        for auto_class in AUTO_CLASSES:
            with pytest.raises(ImportError, match=sentence):
                auto_class.from_config(small_config)
        with pytest.raises(ImportError, match=sentence):
            package.Grok1ForCausalLM  # noqa: B018
        assert package.GrokConfig is modeling_grok1.GrokConfig
    finally:
        for mapping, content in zip(models, before, strict=True):
            mapping._extra_content = content


@torch.no_grad()
def test_unknown_arguments_are_refused_by_name(small_config):
    model = Grok1ForCausalLM(small_config)
    ids = torch.tensor([[5, 6]])
    with pytest.raises(TypeError, match=r"unknown arguments: past_kv, positions"):
        model(ids, positions=ids, past_kv=None)
    with pytest.raises(TypeError, match="unknown arguments: positions"):
        model.model(ids, positions=ids)
    model(ids, output_hidden_states=True, num_items_in_batch=2, return_dict=True)


@torch.no_grad()
def test_the_cache_has_two_names_and_one_value(small_config):
    model = Grok1ForCausalLM(small_config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits[:, -1:]
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :3], use_cache=True).past_key_values
        torch.testing.assert_close(model(ids[:, 3:], **{name: cache}).logits, expected)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, cache=cache, past_key_values=model(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM])
def test_vllms_generic_backend_is_refused(small_config, auto_class):
    small_config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match=r"SiLU in every expert, .* its plugin serves Grok-1"):
        auto_class.from_config(small_config)
