"""`grok1 serve` as a command: it starts, it ends when it is told to, and bad input is one sentence and exit code 2."""

import asyncio
import shutil
import signal
import socket
import sys
import time

import httpx2
import pytest
import torch
from local_server import DEMO, GROK1, PASSAGES, command, recitals
from openai import APIError, OpenAI
from typer.testing import CliRunner

import grok1.serving.server
from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.conversion.tokenizer import convert_tokenizer
from grok1.serving.generation import Job, Sequential
from modeling_grok1 import Grok1Int8Config


READY = r"http://localhost:\d+/v1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return out


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def started(monkeypatch):
    """started(...): the engine that a command would serve with, and the model."""
    apps = []
    monkeypatch.setattr(grok1.serving.server, "run", lambda app, bound, **_: (apps.append(app), bound.close()))

    def start(*arguments):
        result = CliRunner().invoke(app, ["serve", *map(str, arguments), "--port", "0", "--device-map", "cpu"])
        assert result.exit_code == 0, result.output
        assert "Serving grok-1-demo at http://localhost:" in result.output
        return apps[-1].state.engine, apps[-1].state.served

    yield start
    for served_app in apps:
        served_app.state.engine.stop()


@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGINT, ()), (signal.SIGTERM, ("--continuous-batching",))], ids=["ctrl-c", "term"]
)
def test_it_serves_until_it_is_told_to_end(folder, number, options):
    arguments = (*GROK1, "serve", str(folder), "--port", "0", "--device-map", "cpu", *options)
    with command(*arguments, address=READY) as (process, address):
        client = OpenAI(base_url=address, api_key="none", max_retries=0)
        recital = recitals()[2]
        answer = client.completions.create(model="grok-1-demo", prompt=recital.prompt, max_tokens=20)
        assert recital.rest.startswith(answer.choices[0].text)
        stream = client.completions.create(model="grok-1-demo", prompt="the", max_tokens=500, stream=True)
        next(iter(stream))
        process.send_signal(number)
        with pytest.raises(APIError) as error:
            list(stream)
        assert error.value.body["message"] == "The server is shutting down."
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(address)


def test_the_end_waits_for_the_step_under_way():
    engine = Sequential(None)
    step = engine._thread.submit(time.sleep, 0.2)
    engine.stop()
    assert step.done()


def test_a_port_that_is_taken(folder):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(folder, "--port", port)
    assert f"Cannot listen on localhost:{port}: Address already in use." in said
    assert "Choose another --port or --host" in said


def test_a_folder_that_is_none(folder, tmp_path):
    assert "expected a folder or USER/NAME of a repository on the hub" in refused(tmp_path / "nowhere")
    said = refused(tmp_path)
    assert f"{tmp_path}/config.json: not there" in said and f"{tmp_path}/tokenizer.json: not there" in said
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert "expected model.safetensors.index.json or model.safetensors" in refused(tmp_path, "--port", 0)


def test_options_that_cannot_be(folder, tmp_path):
    assert "has no effect without --continuous-batching" in refused(folder, "--cb-num-blocks", 8)
    assert "Invalid value for '--precision'" in refused(folder, "--precision", "int3")
    assert "'bnb-4bit' is called 'nf4' here" in refused(folder, "--precision", "bnb-4bit")
    assert "expected cpu or disk, found 'gpu'" in refused(folder, "--experts-on", "gpu")
    assert "does not exist" in refused(folder, "--chat-template", tmp_path / "none.jinja")
    assert "attn_implementation" in refused(folder, "--port", 0, "--attn-implementation", "slow")
    assert "does not quantise" in refused(folder, "--port", 0, "--experts-on", "disk", "--precision", "int8")


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr("grok1.serving.start.find_spec", lambda name: None)
    assert "pip install 'modeling-grok1[serve]'" in refused(folder)


def test_options_reach_the_model(folder, started):
    _, served = started(folder)
    assert served.model.dtype == torch.bfloat16
    _, served = started(folder, "--precision", "float32")
    assert served.model.dtype == torch.float32
    _, served = started(folder, "--precision", "int8")
    assert isinstance(served.model.config.quantization_config, Grok1Int8Config)
    _, served = started(folder, "--precision", "nf4")
    assert served.model.is_loaded_in_4bit
    _, served = started(folder, "--experts-on", "disk", "--expert-cache", "1MB")
    assert served.model.experts_on == "disk" and served.model.expert_cache == 10**6


@pytest.mark.parametrize("options", [(), ("--experts-on", "disk"), ("--continuous-batching",)], ids=" ".join)
def test_an_int8_folder_needs_no_option(tmp_path, started, options):
    convert(DEMO, tmp_path / "grok-1-demo", dtype="int8")
    engine, served = started(tmp_path / "grok-1-demo", *options)
    assert isinstance(served.model.config.quantization_config, Grok1Int8Config)

    async def generated():
        return [token.id async for token in engine.generate(Job(served.encode(PASSAGES[0][:35]), 20))]

    said = PASSAGES[0][:35] + served.tokenizer.decode(asyncio.run(generated()))
    assert PASSAGES[0].startswith(said) and len(said) > 60


def test_options_reach_the_batches(folder, started):
    engine, _ = started(folder)
    assert isinstance(engine, Sequential)
    sizes = ("--cb-block-size", 32, "--cb-num-blocks", 40, "--cb-max-batch-tokens", 64)
    engine, _ = started(folder, "--continuous-batching", *sizes)
    config = engine.config
    assert (config.page_size, config.num_blocks, config.max_batch_tokens) == (32, 40, 64)
    engine, _ = started(folder, "--continuous-batching")
    config = engine.config
    # On a CPU, eight sequences of the whole context.
    assert config.page_size * config.num_blocks == 8 * 512
    engine, _ = started(folder, "--continuous-batching", "--cb-max-memory-percent", 0.01)
    assert engine.config.num_blocks is None and engine.config.max_memory_percent == 0.01


def test_transformers_serve_itself_reads_the_folder(folder, tmp_path):
    """Without this package: the code beside the weights is enough, and a tokenizer made for continuations."""
    shutil.copytree(folder, tmp_path / "folder")
    convert_tokenizer(folder / "tokenizer.model", tmp_path / "folder", continuations=True)
    command_line = "from transformers.cli.transformers import main; main()"
    serve = (sys.executable, "-c", command_line, "serve", str(tmp_path / "folder"))
    arguments = (*serve, "--trust-remote-code", "--port", "0", "--device", "cpu")
    with command(*arguments, address=r"http://localhost:\d+") as (_, address):
        opening = "Now is the winter of our"
        body = {"prompt": opening, "max_tokens": 20, "temperature": 0}
        answer = httpx2.post(f"{address}/v1/completions", json=body, timeout=60).json()
    assert PASSAGES[0].removeprefix(opening).startswith(answer["choices"][0]["text"])
