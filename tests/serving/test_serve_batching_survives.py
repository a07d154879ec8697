"""With continuous batching, what one request does to the worker is not the end of the others' service."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from local_server import DEMO, SMALL_CACHE, recitals, serving

from grok1.conversion.convert import convert
from grok1.serving.batching import MAX_CRASHES, batching_config
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return ServedModel(out, device_map="cpu")


@pytest.fixture
def app(served):
    return build_app(served, batching=batching_config(served.model, **SMALL_CACHE))


@pytest.fixture
def address(app):
    with serving(app) as address:
        yield address


def ask(address, number=0, headers=None, **body):
    body = {"prompt": recitals()[number].prompt, "max_tokens": 5, **body}
    return httpx2.post(f"{address}/v1/completions", json=body, headers=headers, timeout=60)


def is_right(answer, number=0) -> bool:
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    return len(text) > 5 and recitals()[number].rest.startswith(text)


@pytest.mark.parametrize("parameters", [{"temperature": t} for t in (1e-300, 1e-46, 1e-38, 1e-6)], ids=str)
def test_a_temperature_that_float32_cannot_divide_by(address, parameters):
    assert ask(address, **parameters).status_code == 400
    assert is_right(ask(address)) and httpx2.get(f"{address}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "parameters", [{"temperature": 1e-5}, {"temperature": 100, "top_p": 1e-6}, {"temperature": 1, "top_k": 1}], ids=str
)
def test_the_least_values_that_are_accepted(address, parameters):
    assert is_right(ask(address, **parameters))
    assert ask(address, temperature=100, top_k=2**62).status_code == 200
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}


def test_requests_with_the_same_id_are_served_each(address):
    """A proxy that retries sends the id again."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ask(address, n, {"X-Request-ID": "retry"}, max_tokens=20), range(8)))
    assert all(is_right(answer, number) for number, answer in enumerate(answers))


def test_the_worker_is_started_again(address, app, monkeypatch):
    """What throws in it fails the requests that were in it, with status 503; the next one is served."""
    assert is_right(ask(address))
    processor = app.state.engine._manager.batch_processor
    monkeypatch.setattr(processor, "_generation_step", lambda model: 1 / 0)
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda n: ask(address, n), range(2)))
    assert 503 in [answer.status_code for answer in failed]
    message = next(answer.json()["error"]["message"] for answer in failed if answer.status_code == 503)
    assert "division by zero" in message or "restarted" in message
    assert is_right(ask(address, 7), 7)
    health = httpx2.get(f"{address}/health")
    assert health.status_code == 200 and health.json() == {"status": "ok", "restarts": 1}


def test_a_worker_that_dies_again_and_again_is_reported(address, app, monkeypatch):
    monkeypatch.setattr(
        "transformers.generation.continuous_batching.continuous_api.ContinuousBatchProcessor._generation_step",
        lambda self, model: 1 / 0,
    )
    for _ in range(MAX_CRASHES):
        assert ask(address).status_code == 503
        for _ in range(100):
            if not app.state.engine._manager.is_running():
                break
            time.sleep(0.05)
    assert httpx2.get(f"{address}/health").status_code == 503
    monkeypatch.undo()
    assert is_right(ask(address))
    assert httpx2.get(f"{address}/health").json() == {"status": "ok", "restarts": MAX_CRASHES}


def test_a_request_that_left_gives_its_room_back(address, app):
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{address}/v1/completions", json={"prompt": "the", "max_tokens": 400}, timeout=0.3)
    assert is_right(ask(address))
    scheduler = app.state.engine._manager.batch_processor.scheduler
    assert not scheduler.has_pending_requests()
    router = app.state.engine._manager.output_router
    assert not router.result_handlers and router.output_queue.empty()
