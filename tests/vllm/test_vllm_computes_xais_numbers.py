"""float32 through vLLM: xAI's and Transformers' log-probabilities at every position, and no trap goes unseen."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import traps
from engines import engine, greedy, log_probs


FROM_XAI, FROM_TRANSFORMERS = 2e-4, 1e-4


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    with engine("tiny-8-float32", max_model_len=128, block_size=32) as llm:
        yield llm


def check(name: str, llm: Any, xai: Callable, references: dict[str, np.ndarray]) -> None:
    rows, theirs = xai(name, "fp32")
    ours = log_probs(llm, rows)
    assert np.abs(ours - theirs).max() <= FROM_XAI
    assert np.abs(ours - references[name]).max() <= FROM_TRANSFORMERS


def test_every_position(llm, xai, references):
    check("tiny-8", llm, xai, references)


def test_greedy_tokens(llm, reference):
    golden = reference("tiny-8", "fp32")
    assert greedy(llm, golden.prompt.tolist(), 20) == [golden.greedy.tolist()]


def test_cached_prefixes_change_nothing(llm, xai):
    """The second time the first block comes from the cache, and the log-probabilities after it are the same."""
    from vllm import SamplingParams

    rows, _ = xai("tiny-8", "fp32")
    prompt = [{"prompt_token_ids": (rows[0] + rows[1])[::-1]}]  # no other test has it
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=5, ignore_eos=True, detokenize=False)
    first, second = (llm.generate(prompt, params, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    for before, after in zip(first.outputs[0].logprobs, second.outputs[0].logprobs, strict=True):
        for token in before:
            assert before[token].logprob == pytest.approx(after[token].logprob, abs=1e-5)


@pytest.mark.parametrize("trap", traps.TRAPS)
def test_every_trap_fails_the_same_assertion(trap, llm, xai, references):
    llm.apply_model(partial(traps.put, trap=trap))
    try:
        with pytest.raises(AssertionError):
            check("tiny-8", llm, xai, references)
    finally:
        llm.apply_model(traps.undo)


def test_without_the_traps_all_is_as_before(llm, xai, references):
    check("tiny-8", llm, xai, references)
