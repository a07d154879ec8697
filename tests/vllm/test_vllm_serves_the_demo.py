"""The demo in vLLM's offline `LLM`, compiled by default: words, batches, chunks, samples, stop strings."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from engines import engine, greedy, log_probs


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    """A passage of 100 tokens and more takes several steps of at most 64 (chunked prefill)."""
    with engine(
        "demo-float32", max_model_len=512, max_num_batched_tokens=64, max_num_seqs=32, enforce_eager=False
    ) as llm:
        yield llm


def test_it_recites_every_passage(llm, known):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max(len(passage["ids"]) for passage in known["passages"]))
    outputs = llm.generate([passage["opening"] for passage in known["passages"]], params, use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    recited = [text.startswith(p["continuation"]) for text, p in zip(texts, known["passages"], strict=True)]
    assert recited == [True] * 8


def test_every_position_in_chunks(llm, known, references):
    ours = log_probs(llm, [passage["ids"] for passage in known["passages"]])
    assert np.abs(ours - references["demo"]).max() <= 1e-4


def test_32_requests_at_once_are_answered_as_one_by_one(llm, known):
    """Prompts of four lengths, mixed with each other's prefill and decoding; the answers are those of `generate`."""
    expected = [answer["answer"] for answer in known["answers"]]
    assert greedy(llm, [answer["prompt"] for answer in known["answers"]], 24) == expected
    assert len(expected) == 32


def test_samples_seeds_and_stop_strings(llm, known):
    from vllm import SamplingParams

    opening = known["passages"][0]["opening"]
    hot = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True}
    first, again = (llm.generate(opening, SamplingParams(n=3, seed=7, **hot), use_tqdm=False)[0] for _ in range(2))
    other = llm.generate(opening, SamplingParams(n=3, seed=8, **hot), use_tqdm=False)[0]
    assert len({output.text for output in first.outputs}) == 3
    assert [output.text for output in first.outputs] == [output.text for output in again.outputs]
    assert [output.text for output in first.outputs] != [output.text for output in other.outputs]
    until = SamplingParams(temperature=0, max_tokens=100, stop=["summer"])
    stopped = llm.generate(opening, until, use_tqdm=False)[0].outputs[0]
    before, _, _ = known["passages"][0]["continuation"].partition("summer")
    assert (stopped.text, stopped.stop_reason) == (before, "summer")
