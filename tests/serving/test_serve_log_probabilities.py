"""Lists of prompts, `n`, `echo` and log-probabilities, as OpenAI's API has them and lm-evaluation-harness reads them.

Log-probabilities are compared with plain PyTorch.
"""

import math

import pytest
import torch
from local_server import DEMO, recitals, serving
from openai import OpenAI

from grok1.conversion.convert import convert
from grok1.serving import generation
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


RECITAL = recitals()[2]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out, dtype="float32")
    template = out.parent / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    return ServedModel(out, chat_template=template, device_map="cpu")


@pytest.fixture(scope="module")
def client(served):
    with serving(build_app(served)) as address:
        yield OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def complete(client, prompt, **parameters):
    parameters = {"max_tokens": 6, "temperature": 0, **parameters}
    return client.completions.create(model="grok-1-demo", prompt=prompt, **parameters)


def by_hand(served, ids):
    """Log-probabilities (tokens - 1, vocabulary) of what follows each token."""
    with torch.no_grad():
        return served.model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].log_softmax(-1)


def test_several_prompts_in_one_request(client, served):
    texts = [recital.prompt for recital in recitals()[:6:2]]
    ids = [served.encode(text) for text in texts]
    for prompt in (texts, ids):
        answer = complete(client, prompt, n=2)
        assert [choice.index for choice in answer.choices] == list(range(6))
        for number, recital in enumerate(recitals()[:6:2]):
            first, second = answer.choices[2 * number : 2 * number + 2]
            assert recital.rest.startswith(first.text) and first.text == second.text != ""
        assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 36
    assert complete(client, ids[0]).choices[0].text == complete(client, texts[0]).choices[0].text


def test_several_samples_differ_and_a_seed_repeats_them(client):
    def texts(**parameters):
        return [choice.text for choice in complete(client, "the", n=3, temperature=5.0, **parameters).choices]

    assert len(set(texts())) == 3 and texts(seed=1) == texts(seed=1) != texts(seed=2)


def test_several_choices_are_streamed_together(client):
    whole = [choice.text for choice in complete(client, [RECITAL.prompt, "the"], n=2).choices]
    found = [""] * 4
    for chunk in complete(client, [RECITAL.prompt, "the"], n=2, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == whole


def test_echo_puts_the_prompt_before_the_answer(client):
    (choice,) = complete(client, RECITAL.prompt, echo=True).choices
    assert (RECITAL.prompt + RECITAL.rest).startswith(choice.text) and len(choice.text) > len(RECITAL.prompt)
    assert complete(client, "é\n  the ", echo=True, max_tokens=0).choices[0].text == "é\n  the "


@pytest.mark.parametrize("chunk", [512, 4])
def test_log_probabilities_of_prompt_and_answer(client, served, chunk, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL", chunk)
    (choice,) = complete(client, RECITAL.prompt, echo=True, logprobs=3).choices
    ids = served.encode(choice.text)
    expected = by_hand(served, ids)[:-1]
    found = choice.logprobs
    assert len(ids) == len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    own = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), own, rtol=0, atol=1e-4)
    for top, row, token in zip(found.top_logprobs[1:], expected, found.tokens[1:], strict=True):
        assert 3 <= len(top) <= 4 and token in top
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
    assert "".join(found.tokens).removeprefix(" ") == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]


def test_as_lm_evaluation_harness_reads_them(client, served):
    """`local-completions`: the log-likelihood of a continuation, and whether it is the greedy one, by token ids."""
    context, whole = served.encode(RECITAL.prompt), served.encode(RECITAL.prompt + RECITAL.rest[:40])
    answer = complete(client, [whole], max_tokens=1, logprobs=1, seed=1234, echo=True)
    (choice,) = answer.choices
    token_logprobs = choice.logprobs.token_logprobs[len(context) : -1]
    top = choice.logprobs.top_logprobs[len(context) : -1]
    tokens = choice.logprobs.tokens[len(context) : -1]
    greedy = all(max(likely, key=likely.get) == token for token, likely in zip(tokens, top, strict=True))
    expected = by_hand(served, whole)[len(context) - 1 : -1]
    own = expected.gather(1, torch.tensor(whole[len(context) :])[:, None])
    assert sum(token_logprobs) == pytest.approx(own.sum().item(), abs=1e-3)
    assert greedy == bool((expected.argmax(-1) == torch.tensor(whole[len(context) :])).all())
    none = complete(client, [whole], max_tokens=0, logprobs=1, echo=True).choices[0].logprobs
    assert none.token_logprobs == pytest.approx([None, *choice.logprobs.token_logprobs[1:-1]], abs=1e-4)


def test_log_probabilities_of_a_chat(client, served):
    answer = client.chat.completions.create(
        model="grok-1-demo",
        messages=[{"role": "user", "content": RECITAL.prompt}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    (choice,) = answer.choices
    ids = served.encode(RECITAL.prompt)
    for entry in choice.logprobs.content:
        row = by_hand(served, ids)[-1]
        assert entry.logprob == pytest.approx(row.max().item(), abs=1e-4)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert bytes(entry.bytes).decode() == entry.token
        ids.append(int(row.argmax()))
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content


def test_what_is_impossible_has_a_finite_log_probability(client):
    """JSON has no infinity."""
    answer = complete(client, "the", max_tokens=1, logprobs=20)
    assert all(math.isfinite(value) for value in answer.choices[0].logprobs.top_logprobs[0].values())


def test_bias_and_penalties_are_openais(client, served):
    """They are added to and subtracted from the logits."""
    ids = served.encode("the")
    first, second = by_hand(served, ids)[-1].topk(2).indices.tolist()
    gap = float(-by_hand(served, ids)[-1].topk(2).values.diff())

    def said(**parameters):
        return complete(client, "the", max_tokens=1, **parameters).choices[0].text

    best, other = (served.tokenizer.decode([token]) for token in (first, second))
    assert said() == best
    assert said(logit_bias={str(second): gap + 0.01}) == other and said(logit_bias={str(second): gap - 0.01}) == best
    assert said(logit_bias={str(first): -100}) == other
    sampling = generation.Sampling(frequency_penalty=0.5, presence_penalty=1.0)
    choose = generation.Chooser(sampling, torch.device("cpu"))
    logits = torch.tensor([2.0, 1.6, 0.0])
    # 2.0, then 2.0 - 1.5 = 0.5 against 1.6, then 0.5 against 0.1, then 0.0 against both.
    assert [choose(logits) for _ in range(4)] == [0, 1, 0, 1]
