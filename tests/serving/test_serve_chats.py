"""`grok1 serve --chat-template FILE`: chats by OpenAI's client, its responses, and `transformers chat`."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from local_server import DEMO, PASSAGES, ROOT, SMALL_CACHE, serving
from openai import BadRequestError, OpenAI

from grok1.conversion.convert import convert
from grok1.serving.batching import batching_config
from grok1.serving.model import ServedModel
from grok1.serving.server import build_app


TRANSFORMERS = (sys.executable, "-c", "from transformers.cli.transformers import main; main()")
# The contents of all turns, joined: the demo knows the continuation.
TEMPLATE = """{%- for message in messages -%}
    {%- if message.role == "system" -%}{{- raise_exception("No system message, please.") -}}{%- endif -%}
    {{- message.content -}}
{%- endfor -%}"""
OPENING = "Now is the winter of our"
REST = PASSAGES[0].removeprefix(OPENING)  # it begins with a space, and so does every answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("serve") / "grok-1-demo"
    convert(DEMO, out)
    return out


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "words.jinja"
    file.write_text(TEMPLATE)
    return file


@pytest.fixture(scope="module", params=[False, True], ids=["one after the other", "batched"])
def address(request, folder, template):
    served = ServedModel(folder, chat_template=template, device_map="cpu")
    batching = batching_config(served.model, **SMALL_CACHE) if request.param else None
    with serving(build_app(served, batching=batching)) as address:
        yield address


@pytest.fixture
def client(address):
    return OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client, *contents, **parameters):
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return client.chat.completions.create(
        model="grok-1-demo", messages=messages, **{"max_tokens": 40, "temperature": 0, **parameters}
    )


def test_the_template_writes_the_prompt(client):
    answer = chat(client, OPENING)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert REST.startswith(choice.message.content) and answer.usage.completion_tokens == 40
    parts = [{"type": "text", "text": OPENING}]
    assert chat(client, parts).choices[0].message.content == choice.message.content


def test_a_chat_goes_on(client):
    """Three turns that are one passage: the model, then the user, then the model again."""
    first = chat(client, OPENING).choices[0].message.content
    end = REST.index(" ", len(first) + 20)
    second = chat(client, OPENING, first, REST[len(first) : end]).choices[0].message.content
    assert REST[end:].startswith(second) and len(second) > 60


def test_a_chat_is_streamed(client):
    whole = chat(client, OPENING).choices[0].message.content
    first, *chunks, last = chat(client, OPENING, stream=True)
    assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole and len(chunks) > 20


def test_a_template_may_refuse(client):
    with pytest.raises(BadRequestError, match="No system message, please"):
        client.chat.completions.create(model="grok-1-demo", messages=[{"role": "system", "content": "Be brief."}])


def test_a_chat_beyond_the_context(client):
    with pytest.raises(BadRequestError, match="The context is 512 tokens, prompt and answer together"):
        chat(client, "the king " * 300)


def test_a_broken_template_is_found_before_serving(folder, tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("{% for message in messages %}\n{{ message.content }\n{% endfor %}")
    with pytest.raises(ValueError, match=r"broken\.jinja, line 2: unexpected '}'"):
        ServedModel(folder, chat_template=file, device_map="cpu")


@pytest.mark.parametrize("address", [False], indirect=True, ids=["one after the other"])
def test_transformers_chat_talks_to_it(address):
    """With the command of docs/serving.md."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^transformers (chat .*)$", page, re.M)
    line = line.replace("http://localhost:8000", address).replace("grok-1-hf", "grok-1-demo")
    chatting = subprocess.run(
        [*TRANSFORMERS, *shlex.split(line), "do_sample=False", "max_new_tokens=40"],
        input=f"{OPENING}\nn\n!exit\n",  # n: do not continue after the limit
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert chatting.returncode == 0, chatting.stderr
    assert "grok-1-demo was already loaded" in chatting.stdout
    assert "Made glorious summer by this sun of York;" in chatting.stdout
