"""Whatever a field of a request holds, the answer is OpenAI's: 200, or 400 with the error that its clients read.

The fields are those of the schema, the values are generated.
"""

import json

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_server import DEMO, SMALL_CACHE, recitals, serving

from grok1.conversion.convert import convert
from grok1.serving.batching import batching_config
from grok1.serving.model import ServedModel
from grok1.serving.schema import NOT_SUPPORTED, ChatRequest, CompletionRequest
from grok1.serving.server import build_app


VALID = {
    CompletionRequest: {"prompt": "the", "max_tokens": 1},
    ChatRequest: {"messages": [{"role": "user", "content": "the"}], "max_tokens": 1},
}
CASES = [
    (request, name)
    for request in VALID
    for name in sorted({*request.model_json_schema()["properties"], *NOT_SUPPORTED, "no_such_field"})
]
# One value of every kind that JSON has, and those between them.
VALUES = [
    *(True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-300, 1e300, 5e-324),
    *("", "x", "0", "\x00", "\ud83d\ude00", "x" * 2000, "{}", "[]", '{"temperature": "hot"}', '{"max_new_tokens": 1}'),
    *([], [0], [None], ["x"], [[]], [[0]], [{}], ["x", 0], [True], [-1], [10**9], ["x"] * 200, [[[0]]], [""]),
    *(
        {},
        {"": 0},
        {"x": 1},
        {"0": 1},
        {"0": "x"},
        {"-1": 1},
        {"type": "text"},
        {"include_usage": 1},
        {"a": {"b": [1]}},
    ),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module", params=[False, True], ids=["one after the other", "batched"])
def client(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    template = out.parent / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}{{ tone }}")
    served = ServedModel(out, chat_template=template, device_map="cpu")
    batching = batching_config(served.model, **SMALL_CACHE) if request.param else None
    served.model.config.max_position_embeddings = 8  # so that no answer takes long
    with serving(build_app(served, batching=batching)) as address:
        with httpx2.Client(base_url=address, timeout=60) as client:
            yield client
        served.model.config.max_position_embeddings = 512
        # ... and it still serves.
        recital = recitals()[5]
        body = {"prompt": recital.prompt, "max_tokens": 5}
        answer = httpx2.post(f"{address}/v1/completions", json=body).json()
        assert recital.rest.startswith(answer["choices"][0]["text"])
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


def check(client, route, body, name):
    content = json.dumps(body).encode()
    answer = client.post(route, content=content, headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        return answer
    error = answer.json()["error"]
    assert answer.status_code == 400 or (answer.status_code == 404 and name == "model"), (body, answer.text)
    assert error.keys() == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    assert name in error["message"] or name == "model" or "prompt" in error["message"].lower(), (body, error)
    assert len(answer.content) < 10_000
    return answer


@pytest.mark.parametrize(("request_class", "name"), CASES, ids=lambda value: getattr(value, "route", value))
def test_every_field_with_every_kind_of_value(client, request_class, name):
    refused = 0
    for value in VALUES:
        body = {**VALID[request_class], name: value}
        refused += check(client, request_class.route, body, name).status_code != 200
    assert check(client, request_class.route, {**VALID[request_class], name: None}, name).status_code == (
        400 if name in ("prompt", "messages", "no_such_field") else 200
    )
    assert refused > len(VALUES) / 2


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_generated_bodies(client, data):
    request_class = data.draw(st.sampled_from(list(VALID)))
    names = st.sampled_from([name for request, name in CASES if request is request_class])
    body = {**VALID[request_class], **data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))}
    content = json.dumps(body).encode()
    answer = client.post(request_class.route, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), (body, answer.text)
    assert answer.status_code == 200 or answer.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "message",
    [
        *(None, 5, "x", [], {}, {"role": None}, {"role": 5, "content": "x"}, {"role": "user", "content": 5}),
        *({"role": "user", "content": [5]}, {"role": "user", "content": [{}]}, {"role": "user", "content": {"a": 1}}),
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "user", "content": "x", "name": []},
    ],
)
def test_every_message(client, message):
    body = {"messages": [message], "max_tokens": 1}
    assert check(client, "/v1/chat/completions", body, "messages").status_code == 400


@pytest.mark.parametrize("wanted", [{"tone": " king"}, {}, None])
def test_variables_of_the_template_may_be_set(client, wanted):
    body = {**VALID[ChatRequest], "chat_template_kwargs": wanted}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == (2 if wanted else 1)


@pytest.mark.parametrize(
    "name",
    ["chat_template", "tokenize", "messages", "tools", "add_generation_prompt", "return_tensors", "other", "self"],
)
def test_nothing_else_of_a_template_may_be_set(client, name):
    body = {**VALID[ChatRequest], "chat_template_kwargs": {name: "{% for i in range(9**9) %}x{% endfor %}"}}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert (
        f"expected variables of the server's chat template (tone), found {name}" in answer.json()["error"]["message"]
    )
