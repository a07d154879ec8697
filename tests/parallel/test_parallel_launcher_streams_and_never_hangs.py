"""`torchrun -m grok1.distributed`, as torchrun starts it on one machine and on two, and when a rank dies."""

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_grok import save_small_grok
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast


LAUNCHER = ("-m", "grok1.distributed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
PROMPT = "w5 w77 w12 w200"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_small_grok(tmp_path_factory.mktemp("launcher"), eos_token_id=None)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(320)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """What one process writes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, do_sample=False)
    return tokenizer.decode(tokens[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_machines(folder, *options: str) -> list[subprocess.Popen]:
    """Two launchers of one process each, which find each other as two machines do."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    command = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *rendezvous, "--local-addr", "127.0.0.1"]
    return [
        subprocess.Popen(
            [*command, *LAUNCHER, str(folder), *options, "--dtype", "float32", PROMPT],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def worker_of(launcher: subprocess.Popen) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [pid for pid in children if LAUNCHER[1] in Path(f"/proc/{pid}/cmdline").read_text()]
    return int(workers[0])


def first_to_stream(launchers: list[subprocess.Popen]) -> subprocess.Popen:
    """The launcher of rank 0, as soon as its text begins: generation is under way then."""
    with selectors.DefaultSelector() as selector:
        for launcher in launchers:
            selector.register(launcher.stdout, selectors.EVENT_READ, launcher)
        ready = selector.select(timeout=90)
    assert ready, "no rank began to stream"
    return ready[0][0].data


def test_one_machine_streams_from_the_first_process_only(folder, expected):
    options = ["--tp", "2", "--ep", "2", "--dtype", "float32", "--max-new-tokens", "12", "--prefill-chunk", "3"]
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *LAUNCHER, str(folder), *options, PROMPT],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == expected.split()


def test_two_machines_find_each_other_and_generate(folder, expected):
    launchers = two_machines(folder, "--pp", "2", "--max-new-tokens", "12")
    outputs = [launcher.communicate(timeout=120) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert sorted(stdout.split() for stdout, _ in outputs) == [[], expected.split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_when_a_rank_dies_every_rank_ends_with_an_error(folder, how):
    timeout = 8
    launchers = two_machines(folder, "--tp", "2", "--max-new-tokens", "100000", "--timeout", str(timeout))
    try:
        streaming = first_to_stream(launchers)
        other = next(launcher for launcher in launchers if launcher is not streaming)
        victim = worker_of(other)
        os.kill(victim, how)
        struck = time.monotonic()
        _, error = streaming.communicate(timeout=60)
        waited = time.monotonic() - struck
        assert streaming.returncode != 0
        assert re.search(r"RuntimeError|DistBackendError|Connection closed|Timed out|ChildFailedError", error)
        assert waited < timeout + 40  # torchrun itself gives its workers up to thirty seconds to end
        if how == signal.SIGSTOP:
            os.kill(victim, signal.SIGKILL)
        other.communicate(timeout=60)
        assert other.returncode != 0
    finally:
        for launcher in launchers:
            launcher.kill()
