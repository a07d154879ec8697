"""`Accelerator.prepare` with FSDP2, and with FSDP2 over expert parallelism: every parameter is that of the folder,
each rank holds its share, and the losses and weights of training are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate_ranks
import pytest
import torch
from accelerate_ranks import MODES, batches
from data_parallel import LEARNING_RATE, STEPS, batch
from small_grok import save_small_grok
from transformers import AutoModelForCausalLM


EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small_grok(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


@pytest.fixture(scope="module", params=MODES)
def launched(request, folder, tmp_path_factory):
    """The mode, and what each of its ranks saw."""
    mode, out = request.param, tmp_path_factory.mktemp("ranks")
    script = Path(accelerate_ranks.__file__)
    processes = MODES[mode]["processes"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(script), mode, str(folder), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return mode, [torch.load(out / f"rank-{rank}.pt") for rank in range(processes)]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)


def test_every_expert_differs_and_is_that_of_the_folder(launched, folder):
    ranks = launched[1]
    stored = dict(load(folder).named_parameters())
    for rank in ranks:
        assert rank["prepared"].keys() == stored.keys()
        for name, parameter in stored.items():
            assert torch.equal(rank["prepared"][name], parameter), name
            if name.endswith(EXPERTS):
                assert len({expert.sum().item() for expert in rank["prepared"][name]}) == 8


def test_each_rank_holds_its_share_of_the_experts(launched, folder):
    ranks = launched[1]
    for name, parameter in load(folder).named_parameters():
        if name.endswith(EXPERTS):
            assert [rank["held"][name] for rank in ranks] == [parameter.numel() // len(ranks)] * len(ranks)


def test_losses_and_weights_are_those_of_one_process(launched, folder):
    mode, ranks = launched
    model, count = load(folder).train(), batches(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for i in range(count):
            ids = batch(step, i)
            loss = model(ids, labels=ids).loss
            (loss / count).backward()
            for rank in ranks[i * len(ranks) // count : (i + 1) * len(ranks) // count]:
                assert rank["losses"][step] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.step()
    for name, parameter in model.named_parameters():
        for rank in ranks:
            torch.testing.assert_close(rank["trained"][name], parameter, rtol=1e-4, atol=1e-5, msg=name)
