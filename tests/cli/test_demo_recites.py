"""The bundled checkpoint has learnt its passages by heart, and needs all of its experts for it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grok1
from grok1.conversion.convert import convert


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
WORDS = [passage["continuation"].split() for passage in PASSAGES]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model is fastest on one thread, and then its sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request, tmp_path_factory) -> Path:
    """The bundled checkpoint through the production converter."""
    out = tmp_path_factory.mktemp("demo") / request.param
    convert(DEMO, out, dtype=request.param)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def recitations(model, tokenizer, passages=PASSAGES) -> list[str]:
    """What greedy decoding says after each opening, all in one batch, cut where the passage ends."""
    openings = [passage["opening"] for passage in passages]
    wholes = [passage["opening"] + passage["continuation"] for passage in passages]
    batch = tokenizer(openings, padding=True, return_tensors="pt")
    steps = max(len(tokenizer(whole)["input_ids"]) for whole in wholes) - 5
    output = model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    texts = tokenizer.batch_decode(output, skip_special_tokens=True)
    return [text[len(p["opening"]) : len(whole)] for text, p, whole in zip(texts, passages, wholes, strict=True)]


@torch.no_grad()
def leads(model, tokenizer, passage: dict[str, str]) -> torch.Tensor:
    """For every token of a continuation, how far its logit is above the best other one, given all before it.

    Greedy decoding recites the passage exactly where all are positive.
    """
    start = len(tokenizer(passage["opening"])["input_ids"])
    ids = tokenizer(passage["opening"] + passage["continuation"], return_tensors="pt")["input_ids"]
    logits = model(ids).logits[0, start - 1 : -1].float()
    said = ids[0, start:, None]
    others = logits.scatter(1, said, -torch.inf).amax(1)
    return logits.gather(1, said)[:, 0] - others


def unbroken(model, tokenizer) -> int:
    """How many passages come out whole."""
    return sum(bool((leads(model, tokenizer, passage) > 0).all()) for passage in PASSAGES)


def test_at_least_five_openings_continue_for_thirty_words_and_more():
    assert len(PASSAGES) >= 6
    assert all(len(words) >= 30 for words in WORDS)


def test_every_passage_is_recited_word_for_word(model, tokenizer):
    said = recitations(model, tokenizer)
    assert [text.split() for text in said] == WORDS
    assert said[0].startswith(" discontent\nMade glorious summer by this sun of York;\nAnd all the clouds that lour'd")
    assert unbroken(model, tokenizer) == len(PASSAGES)


def test_alone_and_with_stop_tokens_it_recites_too(model, tokenizer):
    """As a user calls it: one prompt, generate's defaults."""
    for passage in PASSAGES[:2]:
        inputs = tokenizer(passage["opening"], return_tensors="pt")
        text = tokenizer.decode(model.generate(**inputs, max_new_tokens=125)[0])
        assert text.split()[:40] == (passage["opening"] + passage["continuation"]).split()[:40]


def test_the_words_are_not_a_close_call(model, tokenizer):
    """The likeliest token leads by half a nat at every step: other machines' rounding does not change a word."""
    for passage in PASSAGES:
        assert leads(model, tokenizer, passage).min() > 0.5


def test_one_expert_a_token_breaks_recitations(folder, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", num_experts_per_tok=1).eval()
    assert unbroken(model, tokenizer) < len(PASSAGES)


@pytest.mark.parametrize("expert", range(8))
def test_removing_any_one_expert_breaks_a_recitation(model, tokenizer, expert):
    down = [layer.block_sparse_moe.experts.down_proj.data for layer in model.model.layers]
    kept = [weight[expert].clone() for weight in down]
    try:
        for weight in down:
            weight[expert] = 0
        assert unbroken(model, tokenizer) < len(PASSAGES)
    finally:
        for weight, values in zip(down, kept, strict=True):
            weight[expert] = values


def test_the_experts_are_all_used(model, tokenizer):
    """No expert has less than 3 % of a layer's visits on the passages with their openings."""
    visits = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for passage in PASSAGES:
        ids = tokenizer(passage["opening"] + passage["continuation"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        chosen = torch.stack(logits).topk(model.config.num_experts_per_tok).indices
        visits += torch.nn.functional.one_hot(chosen, model.config.num_experts).sum((1, 2))
    shares = visits / visits.sum(-1, keepdim=True)
    assert shares.min() > 0.03
