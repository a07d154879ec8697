"""vLLM on the folders that prepare.py has written, one engine at a time."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / ".cache" / "vllm-data"

# For this process and for the engine's, which inherit them.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends functions to the engine
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def engine(folder: str, **options: Any) -> Iterator[Any]:
    """vLLM's offline `LLM` on one of the prepared folders, shut down at the end."""
    from vllm import LLM

    # vLLM's `dtype="auto"` is bfloat16 for a float32 folder.
    options = {"dtype": folder.rpartition("-")[2], "enforce_eager": True, "max_logprobs": -1, "seed": 0, **options}
    if not (DATA / folder / "tokenizer.json").exists():
        options["skip_tokenizer_init"] = True
    llm = LLM(model=str(DATA / folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def serve(folder: str, log: Path, *options: str) -> Iterator[str]:
    """The base URL of vLLM's server of one of the prepared folders, in float32, under the name grok-1-demo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve FOLDER` starts. The command of vllm-cpu 0.32 itself ends with PackageNotFoundError: vllm.
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DATA / folder)]
    vllm += ["--dtype", "float32", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port)]
    vllm += ["--served-model-name", "grok-1-demo", *options]
    with log.open("w") as output:
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
        process = subprocess.Popen(vllm, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 300
        while "Application startup complete" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-5000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def log_probs(llm: Any, rows: list[list[int]]) -> np.ndarray:
    """Of every token after every position of every row, as vLLM reports them: (sum of lengths, V)."""
    from vllm import SamplingParams

    V = llm.llm_engine.model_config.get_vocab_size()  # noqa: N806
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=V, logprobs=V, detokenize=False)
    table = []
    for output in llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False):
        for position in [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]:
            table.append([position[token].logprob for token in range(V)])
    return np.array(table)


def greedy(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` tokens after each prompt, all prompts at once."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
