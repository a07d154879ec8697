"""The load-balancing loss under gradient accumulation on two processes has the weight of one large batch."""

import subprocess
import sys
from pathlib import Path

import balanced_ranks
import pytest
import torch
from balanced_ranks import ROWS, step

from modeling_grok1 import Grok1ForCausalLM


def test_two_processes_that_accumulate_have_the_gradients_of_one_large_batch(small_config, tmp_path):
    torch.manual_seed(0)
    small_config.initializer_range = 0.2
    Grok1ForCausalLM(small_config).save_pretrained(tmp_path / "base")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    script = [balanced_ranks.__file__, str(tmp_path / "base"), str(tmp_path), "1", "2"]
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    expected = step(str(tmp_path / "base"), tmp_path, batch=ROWS, accumulate=1)
    with_less_balance = Grok1ForCausalLM.from_pretrained(tmp_path / "base")
    tokens = balanced_ranks.ROW[None]
    cross_entropy = with_less_balance(tokens, labels=tokens).loss.item()
    assert expected["loss"] > cross_entropy + 1  # so that a balance of another weight would be seen
    for rank in range(2):
        found = torch.load(Path(tmp_path) / f"rank-{rank}.pt")
        assert found["processes"] == 2
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
