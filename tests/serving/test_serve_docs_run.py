"""Every block of docs/serving.md does what the page says: the servers are started, the clients talk to them."""

import re
import shlex

import pytest
from local_server import DEMO, GROK1, ROOT, command
from typer.testing import CliRunner

import grok1.serving.server
from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.serving.batching import batching_config
from modeling_grok1 import GrokConfig


PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
SERVERS = [code for language, code in BLOCKS if language == "bash" and code.startswith("grok1 serve")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    convert(DEMO, folder / "grok-1-hf")
    (template,) = (code for language, code in BLOCKS if language == "text")
    (folder / "chat.jinja").write_text(template)
    return folder


def test_the_page_is_known():
    assert [language for language, _ in BLOCKS] == [
        "bash",  # the demo
        *("bash", "python", "bash", "bash", "bash", "bash"),  # vLLM, which needs GPUs
        *("bash", "python", "bash", "text", "bash", "python", "bash"),
    ]
    assert [server.split()[:3] for server in SERVERS] == [["grok1", "serve", "grok-1-hf"]] * 3
    # The last block is run by test_serve_chats.py.
    assert BLOCKS[-1][1].startswith("transformers chat grok-1-hf http://localhost:8000/v1 ")


def test_the_clients_talk_to_the_server(folder, capsys):
    """To the one with a chat template, which completes like the first."""
    _, completions, chat = (code for language, code in BLOCKS if language == "python")
    arguments = (*GROK1, *shlex.split(SERVERS[2])[1:], "--port", "0", "--device-map", "cpu")
    with command(*arguments, address=r"http://localhost:\d+", cwd=folder) as (_, address):
        scope: dict = {}
        exec(completions.replace("http://localhost:8000", address), scope)
        whole = scope["answer"].choices[0].text
        assert whole and capsys.readouterr().out == f"{whole}\n{whole}"
        exec(chat, scope)
        (choice,) = scope["answer"].choices
        assert choice.message.content and capsys.readouterr().out == choice.message.content + "\n"


def test_the_batches_are_as_large_as_the_page_says(folder, monkeypatch):
    apps = []
    monkeypatch.setattr(grok1.serving.server, "run", lambda app, bound, **_: (apps.append(app), bound.close()))
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(app, [*shlex.split(SERVERS[1])[1:], "--port", "0", "--device-map", "cpu"])
    assert result.exit_code == 0, result.output
    apps[0].state.engine.stop()
    config = apps[0].state.engine.config
    assert (config.page_size, config.num_blocks, config.max_batch_tokens) == (256, 256, 256)
    released = GrokConfig()
    assert config.page_size * config.num_blocks == 8 * released.max_position_embeddings
    heads = 2 * released.num_key_value_heads * released.head_dim * 2  # keys and values in bfloat16
    assert config.page_size * config.num_blocks * released.num_hidden_layers * heads == 16 * 2**30
    assert "16 GiB" in PAGE
    # ... and as they are on a CPU without the options.
    apps[0].state.served.model.config.max_position_embeddings = released.max_position_embeddings
    assert batching_config(apps[0].state.served.model) == config
