"""What `grok1 serve` cannot do is one sentence with a status of the 400s, and the server keeps serving."""

import json

import httpx2
import pytest
from local_server import DEMO, SMALL_CACHE, recitals, serving
from openai import BadRequestError, NotFoundError, OpenAI

from grok1.conversion.convert import convert
from grok1.serving.batching import batching_config
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return out


@pytest.fixture(scope="module", params=[False, True], ids=["one after the other", "batched"])
def batched(request):
    return request.param


@pytest.fixture(scope="module")
def address(batched, folder):
    served = ServedModel(folder, device_map="cpu")
    batching = batching_config(served.model, **SMALL_CACHE) if batched else None
    with serving(build_app(served, batching=batching)) as address:
        yield address


@pytest.fixture
def client(address):
    """Asks for a completion afterwards: after a refusal the server still answers."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    yield client
    recital = recitals()[5]
    answer = client.completions.create(model="grok-1-demo", prompt=recital.prompt, max_tokens=5)
    assert recital.rest.startswith(answer.choices[0].text)


def detail(error) -> str:
    return error.value.body["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(client, stream):
    with pytest.raises(BadRequestError) as error:
        client.completions.create(model="grok-1-demo", prompt="the king " * 300, stream=stream)
    assert detail(error) == (
        "The context is 512 tokens, prompt and answer together, and the prompt alone has 601. Shorten it."
    )


def test_a_prompt_of_the_whole_context_leaves_no_room(client):
    def ask(words):
        return client.completions.create(model="grok-1-demo", prompt="the" + " king" * words, temperature=0)

    assert ask(510).usage.total_tokens == 512
    with pytest.raises(BadRequestError, match="the prompt alone has 512"):
        ask(511)


def test_an_empty_prompt(client):
    with pytest.raises(BadRequestError, match="The prompt is empty: expected at least one token"):
        client.completions.create(model="grok-1-demo", prompt="")


def test_a_chat_without_a_template_says_what_to_do(client):
    for stream in (False, True):
        with pytest.raises(BadRequestError) as error:
            client.chat.completions.create(
                model="grok-1-demo", messages=[{"role": "user", "content": "Hello"}], stream=stream
            )
        assert "no chat template: Grok-1 is a base model" in detail(error)
        assert "--chat-template FILE" in detail(error) and "/v1/completions" in detail(error)


@pytest.fixture
def loads_nothing(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("loaded another model")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)


def test_another_model_is_neither_loaded_nor_fetched(client, address, loads_nothing):
    with pytest.raises(NotFoundError) as error:
        client.completions.create(model="somebody/something", prompt="Hello")
    assert detail(error) == "This server has one model, 'grok-1-demo'; found 'somebody/something' in the request."
    answer = httpx2.post(f"{address}/load_model", json={"model": "somebody/something"})
    assert answer.status_code == 404 and "one model" in answer.json()["error"]["message"]


def test_the_name_or_the_path_or_nothing_names_the_model(client, address, folder):
    (model,) = client.models.list().data
    assert model.id == "grok-1-demo"
    for body in ({"model": "grok-1-demo"}, {"model": str(folder)}, {}):
        answer = httpx2.post(f"{address}/v1/completions", json={**body, "prompt": "the", "max_tokens": 1})
        assert answer.json()["model"] == "grok-1-demo"


@pytest.mark.parametrize("content", [b'{"prompt": ', b"[]", b""])
def test_bad_json(client, address, content):
    for path in ("completions", "chat/completions"):
        answer = httpx2.post(f"{address}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "The request is not a JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"prompt": []}, "prompt: expected a string, a list of token ids, or a list of"),
        ({"prompt": [5, "one"]}, "prompt: expected a string, a list of token ids, or a list of"),
        ({"prompt": [[10**9]]}, "prompt: expected token ids from 0 to"),
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, found -1"),
        ({"temperature": "hot"}, "temperature: Input should be a valid number, found 'hot'"),
        ({"temperature": 1e-300}, "temperature: expected 0 (greedy) or a number from 0.00001 to 100"),
        ({"top_p": 1.5}, "top_p: Input should be less than or equal to 1, found 1.5"),
        ({"top_p": 1e-300}, "top_p: Input should be greater than or equal to"),
        ({"max_tokens": 0}, "max_tokens: expected a number from 1 on; 0 needs echo"),
        ({"stop": list("abcde")}, "stop: List should have at most 4 items"),
        ({"n": 129}, "n: Input should be less than or equal to 128"),
        ({"n": 65, "prompt": ["one", "two"]}, "n: expected at most 128 choices, found 2 prompts x 65"),
        ({"best_of": 3, "tools": [{}], "suffix": "x"}, "leave out: best_of, suffix, tools"),
        ({"store": 0}, "leave out: store"),
        ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options: has no effect without stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias: expected token ids below"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias: expected token ids below"),
        ({"num_beams": 4}, "num_beams: not a parameter of this server"),
        ({"generation_config": json.dumps({"max_new_tokens": -1})}, "max_new_tokens"),
        ({"generation_config": json.dumps({"num_beams": 4})}, "num_beams: not a parameter of this server"),
        ({"generation_config": "[" * 100_000}, "generation_config: expected the JSON of a GenerationConfig"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wish_that_would_be_left_out_of_account(client, address, wish, says, stream):
    answer = httpx2.post(
        f"{address}/v1/completions", json={"prompt": "the", "stream": stream, "max_tokens": 1, **wish}
    )
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]["message"]


def test_what_clients_send_without_meaning_it_is_accepted(client):
    answer = client.completions.create(
        model="grok-1-demo",
        prompt="the",
        max_tokens=1,
        n=1,
        best_of=1,
        echo=False,
        presence_penalty=0.0,
        frequency_penalty=0,
        user="somebody",
    )
    assert answer.usage.completion_tokens == 1


def test_a_batch_refuses_what_only_one_after_the_other_can_do(client, address, batched):
    wishes = {"logprobs": 1, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {"7": 1}}
    for name, value in wishes.items():
        answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 3, name: value})
        assert answer.status_code == (400 if batched else 200)
        assert not batched or f"leave out: {name}. A server without that option has it" in answer.text


@pytest.mark.parametrize(
    "messages", [None, [], "Hello", [{"content": "Hello"}], ["Hello"], [{"role": "user", "content": 5}]]
)
def test_a_chat_that_is_none(client, address, messages):
    answer = httpx2.post(f"{address}/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
    assert answer.json()["error"]["message"].startswith("messages")


def test_a_request_larger_than_the_cache_does_not_end_the_batching(folder):
    served = ServedModel(folder, device_map="cpu")
    batching = batching_config(served.model, page_size=16, num_blocks=3, max_batch_tokens=32)
    with serving(build_app(served, batching=batching)) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        recital = recitals()[0]
        answer = client.completions.create(model="grok-1-demo", prompt=recital.prompt, max_tokens=100)
        assert answer.usage.total_tokens == 48 and recital.rest.startswith(answer.choices[0].text)
        with pytest.raises(BadRequestError, match="The context is 48 tokens"):
            client.completions.create(model="grok-1-demo", prompt="the" + " king" * 60)
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
