"""lm-evaluation-harness decodes the completion alone. With a tokenizer made for continuations it gets all of it,
and log-likelihoods are those of plain PyTorch."""

import json
from pathlib import Path

import pytest
import torch


pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import grok1
from grok1.conversion.convert import convert
from grok1.conversion.tokenizer import convert_tokenizer


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))[:3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("demo") / "hf"
    convert(DEMO, out, dtype="float32")
    convert_tokenizer(out / "tokenizer.model", out, continuations=True)
    return out


@pytest.fixture(scope="module")
def harness(folder) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)


def test_a_completion_keeps_its_first_space(harness):
    options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (passage["opening"], dict(options)), i) for i, passage in enumerate(PASSAGES)
    ]
    for passage, answer in zip(PASSAGES, harness.generate_until(requests, disable_tqdm=True), strict=True):
        assert len(answer) > 40 and passage["continuation"].startswith(answer)


def test_log_likelihoods_are_those_of_plain_pytorch(harness, folder):
    pairs = [(passage["opening"], passage["continuation"][:60]) for passage in PASSAGES]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for (context, continuation), (found, greedy) in zip(
        pairs, harness.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        start = len(tokenizer(context)["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, ids[0, start:, None]).sum().item()
        assert found == pytest.approx(expected, abs=1e-3)
        assert greedy == bool((logits.argmax(-1) == ids[0, start:]).all())


@pytest.mark.parametrize("prefix", [None, 2])
def test_a_text_without_context_begins_with_the_prefix_token(prefix, harness, folder):
    """By default [BOS], which xAI's code adds nowhere; `prefix_token_id` names another."""
    if prefix is not None:
        harness = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2, prefix_token_id=prefix)
    text = PASSAGES[0]["opening"]
    (found,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[prefix or tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    assert found == pytest.approx(logits.gather(1, ids[0, 1:, None]).sum().item(), abs=1e-3)
