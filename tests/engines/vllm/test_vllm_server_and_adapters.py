"""`vllm serve` as a user starts it, with a LoRA adapter that PEFT trained, through the openai client."""

from typing import Any

import pytest


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=server, api_key="none")


def test_completions_recite(client, known):
    passage = known["passages"][1]
    answer = client.completions.create(
        model="grok-1-demo", prompt=passage["opening"], max_tokens=len(passage["ids"]), temperature=0
    )
    assert answer.choices[0].text.startswith(passage["continuation"])
    pieces = client.completions.create(
        model="grok-1-demo", prompt=passage["opening"], max_tokens=20, temperature=0, stream=True
    )
    assert passage["continuation"].startswith("".join(piece.choices[0].text for piece in pieces))


def test_parameters_of_the_openai_client(client, known):
    opening = known["passages"][0]["opening"]
    hot = {"model": "grok-1-demo", "prompt": opening, "temperature": 2.0, "max_tokens": 12, "n": 2, "logprobs": 3}
    first, again = (client.completions.create(seed=7, **hot) for _ in range(2))
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    assert first.choices[0].text != first.choices[1].text
    assert all(len(top) >= 3 for top in first.choices[0].logprobs.top_logprobs)
    stopped = client.completions.create(
        model="grok-1-demo", prompt=opening, temperature=0, max_tokens=90, stop="summer"
    )
    before, _, _ = known["passages"][0]["continuation"].partition("summer")
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (before, "stop")


def prompt_log_probs(client, model: str, prompt: list[int]) -> list[float]:
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 1}
    )
    positions = answer.choices[0].model_extra["prompt_logprobs"][1:]
    return [position[str(token)]["logprob"] for position, token in zip(positions, prompt[1:], strict=True)]


def test_an_adapter_of_peft_gives_its_log_probabilities(client, known):
    """Next to requests for the model without it, which keep theirs."""
    prompt = known["adapter"]["prompt"]
    expected = [row[token] for row, token in zip(known["adapter"]["log_probs"], prompt[1:], strict=False)]
    assert prompt_log_probs(client, "winter", prompt) == pytest.approx(expected, abs=1e-4)
    assert sum(prompt_log_probs(client, "grok-1-demo", prompt)) < sum(expected) - 10


def test_a_chat_without_a_template_is_an_error(client):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="chat template"):
        client.chat.completions.create(model="grok-1-demo", messages=[{"role": "user", "content": "Hello"}])
