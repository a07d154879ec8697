"""Tensor parallel, pipeline parallel and both give the log-probabilities of Transformers."""

import numpy as np
import pytest
from engines import engine, greedy, log_probs


RANKS = {
    "tensor": {"tensor_parallel_size": 2},
    # Not eager: vLLM's runner allocates what a later stage receives in a warm-up, which it leaves out for eager models
    # on a CPU. Then it ends at `assert self.intermediate_tensors is not None`, for its own Mixtral too.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}
RANKS["both"] = RANKS["tensor"] | RANKS["pipeline"]


@pytest.mark.parametrize("kind", ["tensor", "pipeline", pytest.param("both", marks=pytest.mark.slow)])
def test_ranks(kind, known, references):
    """Heads of 128, as in the release; chunks of 64 tokens."""
    with engine("wide-float32", max_model_len=256, max_num_batched_tokens=64, max_num_seqs=8, **RANKS[kind]) as llm:
        ours = log_probs(llm, known["wide"])
        assert np.abs(ours - references["wide"]).max() <= 1e-4
        # One step of decoding equals the prompt's next position.
        last = [len(row) - 1 for row in known["wide"]]
        expected = [references["wide"][last[0]].argmax(), references["wide"][sum(last) + 1].argmax()]
        assert [tokens[0] for tokens in greedy(llm, known["wide"], 1)] == expected
