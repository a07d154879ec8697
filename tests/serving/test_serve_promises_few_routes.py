"""The routes of `grok1 serve` are those of its documentation; who may use them, and how much, is bounded."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from local_server import DEMO, recitals, serving
from openai import OpenAI

from grok1.conversion.convert import convert
from grok1.serving.http import Limits
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


LIMITS = Limits(hosts=("grok.example",), max_body=100_000, max_waiting=4)
# What Transformers' server has beside them.
OTHERS = ["/v1/responses", "/v1/systemone", "/v1/audio/transcriptions", "/reset", "/docs", "/redoc", "/openapi.json"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return ServedModel(out, device_map="cpu")


@pytest.fixture(scope="module")
def address(served):
    with serving(build_app(served, limits=LIMITS)) as address:
        yield address


def post(address, body, **options):
    return httpx2.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 1, **body}, **options)


def message(answer) -> str:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error["message"]


@pytest.mark.parametrize("path", [*OTHERS, "/v2/models", "/", "/v1/completions/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_there_are_no_other_routes(address, path, method):
    answer = httpx2.request(method, address + path, json={} if method == "POST" else None)
    assert answer.status_code == 404 and message(answer) == "Not Found"


def test_other_methods_of_a_route_are_refused(address):
    assert httpx2.get(f"{address}/v1/completions").status_code == 405
    assert httpx2.post(f"{address}/health").status_code == 405


def test_a_model_can_be_asked_for(address, served):
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    assert client.models.retrieve("grok-1-demo").id == "grok-1-demo"
    answer = httpx2.get(f"{address}/v1/models/grok-1-demo").json()
    assert answer == httpx2.get(f"{address}/v1/models").json()["data"][0]
    assert answer["max_model_len"] == served.model.config.max_position_embeddings
    assert httpx2.get(f"{address}/v1/models/other").status_code == 404


def test_load_model_loads_nothing(address, monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("loaded another model")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    answer = httpx2.post(f"{address}/load_model", json={"model": "grok-1-demo"})
    assert json.loads(answer.text.removeprefix("data: "))["status"] == "ready"
    for name in ("grok-1-demo:x.gguf", "grok-1-demo:", "grok-1-demo@main", "other"):
        assert httpx2.post(f"{address}/load_model", json={"model": name}).status_code == 404
    for body in ({}, {"model": None}, {"model": 5}):
        assert httpx2.post(f"{address}/load_model", json=body).status_code == 400


def test_the_request_id_is_only_echoed(address):
    first, second = (post(address, {}, headers={"X-Request-ID": "same"}) for _ in range(2))
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "same"
    assert first.json()["id"] != second.json()["id"] and "same" not in first.text
    assert len(post(address, {}, headers={"X-Request-ID": "x" * 5000}).headers["x-request-id"]) == 32
    assert len(post(address, {}).headers["x-request-id"]) == 32


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1", "[::1]:1", "[::1]", "GROK.example:80"])
def test_its_own_names_are_allowed(address, host):
    assert httpx2.get(f"{address}/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "10.0.0.1:8000", "", "[::2]", "a]:b"])
def test_another_host_is_refused(address, host):
    """A web page whose name was pointed at this machine sends its own name."""
    for path in ("/v1/models", "/health"):
        answer = httpx2.get(address + path, headers={"Host": host})
        assert answer.status_code in (400, 403)
        if answer.status_code == 403:
            assert "--allowed-host adds a name" in message(answer)


def test_any_host_where_it_is_asked_for_and_a_key(served):
    with serving(build_app(served, limits=Limits(hosts=("*",), api_key="s3cret-ü"))) as address:
        assert httpx2.get(f"{address}/health", headers={"Host": "any.example"}).json() == {"status": "ok"}
        for header in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer x"}, {"Authorization": "s3cret-ü"}):
            header = {name: value.encode() for name, value in header.items()}
            for path in ("/v1/models", "/v1/completions", "/nowhere"):
                answer = httpx2.get(address + path, headers=header)
                assert answer.status_code == 401 and "Bearer KEY" in message(answer)
        answer = httpx2.get(f"{address}/v1/models", headers={"Authorization": "Bearer s3cret-ü".encode()})
        assert answer.status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_has_a_largest_size(address, declared):
    """With Content-Length before it is read, without one while it is."""
    body = json.dumps({"prompt": "x" * 200_000}).encode()
    content = body if declared else (body[i : i + 1000] for i in range(0, len(body), 1000))
    answer = httpx2.post(f"{address}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "larger than 100,000 bytes. --max-body" in message(answer)


def test_only_json_is_read(address):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = httpx2.post(f"{address}/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert answer.status_code == 415 and "expected application/json" in message(answer)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 50_000,
        b'{"a":' * 10_000,
        b'{"prompt": "\xff"}',
        b'{"prompt": "the", "temperature": NaN}',
        b"null",
        b"1e999",
    ],
)
def test_what_is_no_json_object(address, content):
    answer = httpx2.post(f"{address}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "The request is not a JSON object" in message(answer)


def test_too_long_prompts_are_refused_before_they_are_tokenised(address, served, monkeypatch):
    def encode(text):
        raise AssertionError("tokenised")

    monkeypatch.setattr(served, "encode", encode)
    answer = post(address, {"prompt": "x" * 90_000})
    assert answer.status_code == 400 and "the prompt alone has 90,000 characters" in message(answer)


def test_the_server_answers_while_it_tokenises(address, served, monkeypatch):
    tokenising, go = threading.Event(), threading.Event()

    def encode(text, encode=served.encode):
        tokenising.set()
        assert go.wait(10)
        return encode(text)

    monkeypatch.setattr(served, "encode", encode)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, address, {})
        assert tokenising.wait(10)
        assert httpx2.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
        go.set()
        assert answer.result().status_code == 200


def forward_passes(served, seconds: float) -> int:
    count = [0]
    handle = served.model.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    time.sleep(seconds)
    handle.remove()
    return count[0]


def leave(address, **body):
    """Ask for 400 tokens and close the connection before the answer."""
    with pytest.raises(httpx2.TimeoutException):
        post(address, {"max_tokens": 400, **body}, timeout=0.3)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_computed_for_clients_that_left(address, served, stream):
    if stream:
        with httpx2.stream(
            "POST", f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 400, "stream": True}
        ):
            time.sleep(0.2)
    else:
        for _ in range(3):
            leave(address)
    recital = recitals()[3]
    answer = post(address, {"prompt": recital.prompt, "max_tokens": 5})
    assert recital.rest.startswith(answer.json()["choices"][0]["text"])
    assert forward_passes(served, 0.3) == 0


def test_more_than_the_server_holds_are_refused_and_told_when_to_retry(address):
    """Three of the four choices that may be under way are taken by a stream."""
    body = {"prompt": "the", "max_tokens": 400, "stream": True, "n": 3}
    with httpx2.stream("POST", f"{address}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        answer = post(address, {"n": 2})
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
        assert "3 choices are generated or wait, at most 4 may" in message(answer)
    for _ in range(100):
        if post(address, {"n": 4}).status_code == 200:
            break
        time.sleep(0.05)
    assert post(address, {"n": 8}).status_code == 200  # an idle server takes one of any size
