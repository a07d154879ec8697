"""DeepSpeed's ZeRO-3 on two ranks: the logits of the folder, the training steps of one process over both batches, and
a saved folder that `from_pretrained` reads."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_parallel
import pytest
import torch
from data_parallel import LEARNING_RATE, STEPS, batch
from small_grok import save_small_grok
from transformers import AutoModelForCausalLM


LAYOUTS = ["fused", "linear"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_grok(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    support = Path(data_parallel.__file__).parent
    path = os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launch, str(support / "zero3.py"), str(folder), str(out)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def ranks(out: Path) -> list[dict[str, Any]]:
    return [torch.load(out / f"rank-{rank}.pt") for rank in range(2)]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(5, 12)[None]).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_parameters_are_cut_and_the_logits_are_those_of_the_folder(folder, ranks, layout):
    expected = logits(load(folder))
    for rank in ranks:
        assert sum("experts" in name for name in rank[layout]["cut"]) == (4 if layout == "fused" else 48)
        torch.testing.assert_close(rank[layout]["logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_steps_are_those_of_one_process_and_the_saved_folder_is_the_trained_model(folder, out, ranks, layout):
    model = load(folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            ids = batch(step, rank)
            loss = model(ids, labels=ids).loss
            (loss / 2).backward()
            assert ranks[rank][layout]["losses"][step] == pytest.approx(loss.item(), abs=1e-3)
        optimizer.step()
    torch.testing.assert_close(logits(load(out / layout)), logits(model), rtol=1e-3, atol=1e-3)
