"""Tensor and pipeline parallelism over two processes on one machine give the logits of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FOLDERS, ROOT


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_processes_compute_what_one_does(kind: str) -> None:
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    script = [sys.executable, str(Path(__file__).with_name("two_processes.py"))]
    arguments = [str(FOLDERS), str(ROOT / "tests" / "fixtures" / "golden"), kind]
    done = subprocess.run([*launch, *script, *arguments], capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[-1])
    print(found)
    assert found["processes"] == 2
    assert found["error"] < 2e-4 and found["greedy"] == 20
    for name in ("demo", "demo-int8-float32"):
        assert found[name] < 1e-4
        assert found[f"{name} share"] == 0.5
