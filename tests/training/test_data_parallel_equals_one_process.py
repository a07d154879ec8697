"""Two ranks, which choose different experts, have the gradients and weights of one process that reads both batches."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import torch
from data_parallel import STEPS, build, train

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

MODELS: dict[str, dict[str, Any]] = {
    "full-fused": {"layout": "fused"},
    "full-fused-eager": {"layout": "fused", "experts": "eager"},  # as in longer batches
    "full-linear": {"layout": "linear"},
    "lora-linear": {"layout": "linear", "lora": True},
    "lora-int8": {"layout": "linear", "lora": True, "quantized": "int8"},
    "qlora": {"layout": "linear", "lora": True, "quantized": "nf4"},
}
CASES = {
    f"{name}-{wrap}{'-checkpointed' if checkpointed else ''}": {**model, "wrap": wrap, "checkpointed": checkpointed}
    for (name, model), wrap, checkpointed in itertools.product(MODELS.items(), ("ddp", "fsdp2"), (False, True))
    # FSDP2 cuts parameters of floats only.
    if not (wrap == "fsdp2" and model.get("quantized"))
}
CASES["full-linear-fsdp2-reentrant"] = {
    **MODELS["full-linear"],
    "wrap": "fsdp2",
    "checkpointed": True,
    "reentrant": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GrokConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        attn_output_multiplier=32**-0.5,
        embedding_multiplier_scale=8.0,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("base")
    Grok1ForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    job = out / "job.json"
    job.write_text(json.dumps({"cases": CASES, "folder": str(folder), "out": str(out)}))
    script = Path(data_parallel.__file__)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        str(script),
        str(job),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_are_those_of_one_process_over_both_batches(name, folder, ranks):
    results = [rank[name] for rank in ranks]
    for result in results:
        assert "error" not in result, result["error"]
    assert results[0]["chosen"] != results[1]["chosen"]
    expected = train(build(CASES[name], str(folder)), CASES[name], [0, 1])
    for result in results:
        for step in range(STEPS):
            assert result["gradients"][step].keys() == expected["gradients"][step].keys()
            for parameter, gradient in expected["gradients"][step].items():
                torch.testing.assert_close(
                    result["gradients"][step][parameter], gradient, rtol=1e-4, atol=1e-6, msg=f"{step} {parameter}"
                )
        for parameter, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][parameter], weight, rtol=1e-5, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("training", [False, True])
def test_inference_runs_the_chosen_experts_only(folder, training):
    model = build({"layout": "linear"}, str(folder)).train(training)
    run = []
    for layer in model.model.layers:
        for e, expert in enumerate(layer.block_sparse_moe.experts):
            expert.register_forward_hook(lambda module, args, output, e=e: run.append((e, len(output))))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    assert len(run) == (2 * 8 if training else 2 * 2)
    assert sum(rows for _, rows in run) == 2 * 2
