"""`grok1 serve` says what `generate` says: alone, streamed, sampled, and 32 at a time, every answer checked."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from local_server import DEMO, PASSAGES, SMALL_CACHE, recitals, serving
from openai import OpenAI

from grok1.conversion.convert import convert
from grok1.serving.batching import batching_config
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


RECITALS = recitals()
NEW_TOKENS = 12


@dataclass
class Server:
    client: OpenAI
    served: ServedModel
    batched: bool
    forward_passes: int = 0

    def complete(self, prompt: str, **parameters):
        return self.client.completions.create(
            model="grok-1-demo", prompt=prompt, **{"max_tokens": NEW_TOKENS, "temperature": 0, **parameters}
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return out


@pytest.fixture(scope="module", params=["one after the other", "batched"])
def server(request, folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batched = request.param == "batched"
    served = ServedModel(folder, device_map="cpu")
    batching = batching_config(served.model, **SMALL_CACHE) if batched else None
    with serving(build_app(served, batching=batching)) as address:
        running = Server(OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0), served, batched)

        def count(*_):
            running.forward_passes += 1

        served.model.register_forward_hook(count)
        yield running
    torch.set_num_threads(threads)


def test_a_completion_continues_the_prompt(server):
    prompt, rest = RECITALS[0].prompt, RECITALS[0].rest
    answer = server.complete(prompt)
    assert answer.object == "text_completion" and answer.model == "grok-1-demo"
    (choice,) = answer.choices
    assert rest.startswith(choice.text) and choice.text.startswith(" ") and choice.finish_reason == "length"
    tokenizer = server.served.tokenizer
    length = len(tokenizer(prompt)["input_ids"])
    assert tokenizer(prompt + choice.text)["input_ids"][:length] == tokenizer(prompt)["input_ids"]
    assert answer.usage.prompt_tokens == length and answer.usage.completion_tokens == NEW_TOKENS
    assert answer.usage.total_tokens == length + NEW_TOKENS


def test_a_stream_gives_the_same_text_in_pieces(server):
    for recital in RECITALS[1::8]:
        whole = server.complete(recital.prompt).choices[0].text
        *chunks, last, usage = server.complete(recital.prompt, stream=True, stream_options={"include_usage": True})
        pieces = [chunk.choices[0].text for chunk in chunks]
        assert "".join(pieces) == whole and len(pieces) > NEW_TOKENS / 2
        assert last.choices[0].finish_reason == "length" and last.usage is None
        assert usage.choices == [] and usage.usage.completion_tokens == NEW_TOKENS


def test_32_at_a_time_are_all_right(server):
    """They do not fit in the batched server's cache together."""
    before = server.forward_passes
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda recital: server.complete(recital.prompt).choices[0].text, RECITALS))
    for recital, answer in zip(RECITALS, answers, strict=True):
        assert recital.rest.startswith(answer) and len(answer) > NEW_TOKENS, recital.prompt
    assert len(set(answers)) == 32
    passes = server.forward_passes - before
    if server.batched:
        assert passes < 32 * NEW_TOKENS / 4
    else:
        assert passes == 32 * NEW_TOKENS


def test_every_request_is_sampled_as_it_asks(server):
    prompt, rest = RECITALS[0].prompt, RECITALS[0].rest
    hot = {"temperature": 5.0}
    with ThreadPoolExecutor(8) as pool:
        wishes = [hot, {}, hot, {**hot, "top_p": 1e-6}, hot, {}, hot, {**hot, "top_p": 1e-6}]
        said = list(pool.map(lambda wish: server.complete(prompt, **wish).choices[0].text, wishes))
    greedy, sampled = said[1::2], said[::2]
    assert len(set(greedy)) == 1 and rest.startswith(greedy[0])
    assert len(set(sampled)) == 4 and greedy[0] not in sampled


def test_it_is_greedy_unless_a_temperature_is_given(server):
    answer = server.client.completions.create(model="grok-1-demo", prompt=RECITALS[3].prompt, max_tokens=NEW_TOKENS)
    assert RECITALS[3].rest.startswith(answer.choices[0].text)


def test_the_answer_ends_with_the_context(server):
    tokenizer = server.served.tokenizer
    words = " ".join(PASSAGES).split(" ")
    prompt = " ".join(words[:165])
    length = len(tokenizer(prompt)["input_ids"])
    assert 400 < length < 512
    answer = server.complete(prompt, max_tokens=None)
    assert answer.usage.completion_tokens == 512 - length and answer.choices[0].finish_reason == "length"


def test_a_client_that_goes_away_ends_its_generation(server):
    before = server.forward_passes
    stream = server.complete(RECITALS[0].prompt, max_tokens=400, stream=True)
    assert RECITALS[0].rest.startswith(next(iter(stream)).choices[0].text)
    stream.close()
    # The next client waits for a server that still generates for the first.
    answer = server.complete(RECITALS[9].prompt)
    assert RECITALS[9].rest.startswith(answer.choices[0].text)
    seen = server.forward_passes
    time.sleep(0.1)
    assert server.forward_passes == seen and seen - before < 200


@pytest.mark.parametrize("server", ["one after the other"], indirect=True)  # batches share one random stream
def test_a_seed_makes_a_sample_repeatable(server):
    first, again, other = (
        server.complete(RECITALS[0].prompt, temperature=2.0, seed=seed).choices[0].text for seed in (1, 1, 2)
    )
    assert first == again != other


def test_stop_ends_the_answer(server):
    """The stop string is not in it, in a stream neither, and generation ends there."""
    before = server.forward_passes
    (choice,) = server.complete(RECITALS[0].prompt, max_tokens=400, stop=["no such", "York"]).choices
    assert choice.finish_reason == "stop" and choice.text.endswith("sun of ")
    assert (RECITALS[0].rest).startswith(choice.text + "York")
    chunks = list(server.complete(RECITALS[0].prompt, max_tokens=400, stop=["no such", "York"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert server.forward_passes - before < 200
