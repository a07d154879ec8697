"""mlx_lm.convert, lora, fuse, perplexity and server on the demo's folder."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import greedy
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.tokenizer_utils import TokenizerWrapper
from openai import OpenAI


Passages = list[dict[str, str]]
Command = Callable[..., str]
Folder = Callable[[str], Path]


@pytest.mark.parametrize(("source", "bits"), [("demo", 8), ("demo", 4), ("demo-bfloat16", 4)])
def test_convert_quantises_and_the_demo_recites(
    source: str, bits: int, mlx_lm: Command, folder: Folder, load: Callable[..., nn.Module],
    tokenizer: TokenizerWrapper, passages: Passages, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "quantised"
    options = ("--hf-path", folder(source), "--mlx-path", out, "-q", "--q-bits", bits, "--q-group-size", 32)
    mlx_lm("convert", *options)
    model = load(out)
    assert len(json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["decoder"]["decoders"]) == 3
    assert model.layers[0].block_sparse_moe.switch_mlp.up_proj.bits == bits
    kept = {n: a.dtype for n, a in tree_flatten(model.parameters()) if n.endswith(("norm.weight", "gate.weight"))}
    assert len(kept) == 4 * 5 + 1 and set(kept.values()) == {mx.float32}
    right = 0
    for passage in passages:
        prompt = tokenizer.encode(passage["opening"])
        text = tokenizer.encode(passage["opening"] + passage["continuation"])[: len(prompt) + 20]
        right += greedy(model, prompt, len(text) - len(prompt)) == text[len(prompt) :]
    print(f"{source} in {bits} bits: {right} of {len(passages)}")
    assert right == len(passages)


def test_lora_learns_and_fuse_keeps_it(
    mlx_lm: Command, folder: Folder, load: Callable[..., nn.Module], tokenizer: TokenizerWrapper, tmp_path: Path
) -> None:
    question, answer = "What is the capital of France?", " Paris, my lord."
    rows = json.dumps({"text": question + answer}) + "\n"
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows * 8)
    model, adapter = ("--model", folder("demo")), ("--adapter-path", tmp_path / "adapter")
    steps = ("--iters", 40, "--batch-size", 2, "--learning-rate", 3e-4, "--num-layers", 4)
    printed = mlx_lm("lora", *model, "--train", "--data", tmp_path / "data", *steps, *adapter, "--val-batches", 1)
    plain = re.sub(r"\x1b\[[\d;]*m", "", printed)
    losses = [float(loss) for loss in re.findall(r"\bval ([\d.]+)", plain)]
    print(f"validation loss {losses[0]} to {losses[-1]}")
    assert losses[-1] < losses[0] / 4
    trained = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    assert {name.split(".")[-2] for name in trained} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip

    mlx_lm("fuse", *model, *adapter, "--save-path", tmp_path / "fused")
    assert (
        len(json.loads((tmp_path / "fused" / "tokenizer.json").read_text(encoding="utf-8"))["decoder"]["decoders"])
        == 3
    )
    tokens = len(tokenizer.encode(question + answer)) - len(tokenizer.encode(question))
    assert generate(load(tmp_path / "fused"), tokenizer, question, max_tokens=tokens) == answer
    assert generate(load(folder("demo")), tokenizer, question, max_tokens=tokens) != answer


def test_perplexity(
    mlx_lm: Command, folder: Folder, demo: nn.Module, tokenizer: TokenizerWrapper, passages: Passages, tmp_path: Path
) -> None:
    text = passages[0]["opening"] + passages[0]["continuation"]
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": text}) + "\n")
    length = 64
    sizes = ("--num-samples", 1, "--sequence-length", length)
    printed = mlx_lm("perplexity", "--model", folder("demo"), "--data-path", tmp_path, *sizes)
    found = float(re.search(r"Perplexity: ([\d.]+)", printed)[1])
    ids = tokenizer.encode(text)[:length]
    logits = np.array(demo(mx.array([ids[:-1]]))[0]).astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(length - 1), ids[1:]]
    print(f"perplexity {found}")
    assert found == pytest.approx(np.exp(losses.mean()), abs=2e-3)


def test_evaluate(folder: Folder, passages: Passages, tmp_path: Path) -> None:
    """With a task of lm-evaluation-harness in local files, so that nothing is downloaded: of two continuations, the
    passage's own is the likelier one."""
    rows = [
        {
            "opening": passage["opening"],
            "choices": [passage["continuation"][:40], other["continuation"][:40]],
        }
        for passage, other in zip(passages, passages[1:] + passages[:1], strict=True)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = {
        "task": "passages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{opening}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "passages.yaml").write_text(json.dumps(task))  # JSON is YAML
    command = [str(Path(sys.executable).parent / "mlx_lm.evaluate"), "--model", str(folder("demo-int8"))]
    options = ["--trust-remote-code", "--tasks", "passages.yaml", "--output-dir", "results"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text())["passages"]
    print(found)
    assert found["acc,none"] == 1.0


@pytest.fixture(scope="module")
def server(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """`mlx_lm.server` with the 8-bit demo, and a client."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "mlx_lm.server"), "--model", str(folder("demo-int8"))]
    with (tmp_path_factory.mktemp("server") / "log").open("w+") as log:
        process = subprocess.Popen([*command, "--trust-remote-code", "--port", str(port)], stdout=log, stderr=log)
        try:
            for _ in range(300):
                time.sleep(0.2)
                assert process.poll() is None, Path(log.name).read_text()
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        finally:
            process.terminate()
            process.wait()


def test_the_server_answers_to_the_character(server: OpenAI, passages: Passages) -> None:
    for passage in passages[:3]:
        asked = {"model": "default_model", "prompt": passage["opening"], "max_tokens": 16, "temperature": 0}
        whole = server.completions.create(**asked).choices[0].text
        pieces = [chunk.choices[0].text for chunk in server.completions.create(**asked, stream=True) if chunk.choices]
        assert len(whole) > 12 and passage["continuation"].startswith(whole)
        assert "".join(pieces) == whole and len(pieces) > 4
