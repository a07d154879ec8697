"""What `grok1 serve` cannot do is one sentence with a status of the 400s, and the server keeps serving."""

import json

import httpx2
import pytest
from local_server import DEMO, SMALL_CACHE, recitals, serving
from openai import BadRequestError, NotFoundError, OpenAI

from grok1.conversion.convert import convert
from grok1.serving.generation import batching_config
from grok1.serving.model import FolderManager
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
    manager = FolderManager(folder, device="cpu", continuous_batching=batched)
    batching = batching_config(manager.model, **SMALL_CACHE) if batched else None
    with serving(build_app(manager, batching=batching)) as address:
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
    with pytest.raises(BadRequestError, match="no chat template"):
        client.responses.create(model="grok-1-demo", input="Hello")


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


def test_nobody_can_take_the_model_away(client, address, loads_nothing):
    assert httpx2.post(f"{address}/reset").status_code == 200
    assert client.completions.create(model="grok-1-demo", prompt="the", max_tokens=2).usage.completion_tokens == 2


def test_there_is_no_such_place(client, address):
    answer = httpx2.get(f"{address}/v2/models")
    assert answer.status_code == 404 and answer.json()["error"]["message"] == "Not Found"
    answer = httpx2.post(f"{address}/v1/audio/transcriptions")
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "Grok-1 has no audio input."


@pytest.mark.parametrize("content", [b'{"prompt": ', b"[]", b""])
def test_bad_json(client, address, content):
    for path in ("completions", "chat/completions"):
        answer = httpx2.post(f"{address}/v1/{path}", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert "The request is not a JSON object" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"prompt": ["one", "two"]}, "prompt must be a string"),
        ({"temperature": -1}, "temperature: expected a number from 0 to 100, found -1"),
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 100, found 'hot'"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1, found 1.5"),
        ({"max_tokens": 0}, "max_tokens: expected a number from 1 to"),
        ({"logprobs": 5}, "leave out: logprobs"),
        ({"n": 2, "best_of": 3, "echo": True}, "leave out: best_of, echo, n"),
        ({"presence_penalty": 0.5}, "leave out: presence_penalty"),
        ({"generation_config": json.dumps({"max_new_tokens": -1})}, "max_new_tokens"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wish_that_would_be_left_out_of_account(client, address, wish, says, stream):
    answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "the", "stream": stream, **wish})
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
    for name, value in {"stop": "zz", "frequency_penalty": 0.5}.items():
        answer = httpx2.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 3, name: value})
        assert answer.status_code == (400 if batched else 200)
        assert not batched or f"leave out: {name}" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages", [None, [], "Hello", [{"content": "Hello"}], ["Hello"], [{"role": "user", "content": 5}]]
)
def test_a_chat_that_is_none(client, address, messages):
    answer = httpx2.post(f"{address}/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert "messages: expected a list of objects with role and content" in answer.json()["error"]["message"]


def test_a_request_larger_than_the_cache_does_not_end_the_batching(folder):
    manager = FolderManager(folder, device="cpu", continuous_batching=True)
    batching = batching_config(manager.model, page_size=16, num_blocks=3, max_batch_tokens=32)
    with serving(build_app(manager, batching=batching)) as address:
        client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        recital = recitals()[0]
        answer = client.completions.create(model="grok-1-demo", prompt=recital.prompt, max_tokens=100)
        assert answer.usage.total_tokens == 48 and recital.rest.startswith(answer.choices[0].text)
        with pytest.raises(BadRequestError, match="The context is 48 tokens"):
            client.completions.create(model="grok-1-demo", prompt="the" + " king" * 60)
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
