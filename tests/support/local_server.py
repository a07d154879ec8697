"""What the tests of `grok1 serve` share: a server on loopback, and requests whose greedy answers are known.

The demo recites its passages word for word, so a prompt that is the beginning of a passage has a known continuation.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import grok1


for name in ("starlette", "uvicorn", "openai"):
    pytest.importorskip(name, reason="needs the extra `serve`")

from grok1.serving.server import Server  # noqa: E402


DEMO = Path(grok1.__file__).parent / "demo"
PASSAGES = [
    passage["opening"] + passage["continuation"]
    for passage in json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
]
# Small enough that 32 requests do not fit in it together.
SMALL_CACHE = {"page_size": 16, "num_blocks": 64, "max_batch_tokens": 128}


@dataclass(frozen=True)
class Recital:
    prompt: str
    rest: str


def recitals() -> list[Recital]:
    """32 beginnings of passages, four of each, that end with a word: the rest begins with a space."""
    found = []
    for passage in PASSAGES:
        ends = [i for i, character in enumerate(passage) if character == " " and passage[i - 1].isalpha()]
        found += [Recital(passage[: ends[word]], passage[ends[word] :]) for word in (4, 8, 12, 16)]
    return found


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of `app`, served by a thread."""
    server = Server(app, host="127.0.0.1", port=0, log_level="warning")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


ROOT = Path(__file__).resolve().parents[2]
GROK1 = (sys.executable, "-m", "grok1")


@contextmanager
def command(*arguments: str, address: str, cwd: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running command and its match with the regular expression `address` in what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        arguments, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if found := re.search(address, line):
                break
        else:
            raise AssertionError(f"{arguments[3:]} ended with {process.wait()}:\n{printed}")
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()
