"""What vLLM is compared with: xAI's outputs, and what prepare.py has written."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engines import DATA, serve


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    """Prompts and what Transformers answers, see prepare.py."""
    return json.loads((DATA / "known.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def references() -> dict[str, np.ndarray]:
    """Log-probabilities that Transformers computes in float64, by folder: (sum of lengths, V)."""
    return dict(np.load(DATA / "references.npz"))


@pytest.fixture(scope="session")
def xai(reference: Callable[[str, str], Any]) -> Callable[[str, str], tuple[list[list[int]], np.ndarray]]:
    """xai("tiny-8", "fp32"): the rows without padding, and xAI's log-probabilities at every position of them."""

    def read(name: str, precision: str) -> tuple[list[list[int]], np.ndarray]:
        golden = reference(name, precision)
        real = golden.tokens != 0
        rows = [row[row != 0].tolist() for row in golden.tokens]
        return rows, torch.log_softmax(golden.logits.double(), dim=-1)[real].numpy()

    return read


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a server of the demo in float32, with the adapter that prepare.py has trained."""
    # vLLM would prepare the experts for adapters too, with Triton kernels.
    targets = ["--lora-target-modules", "q_proj", "k_proj", "v_proj", "o_proj"]
    adapters = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"winter={DATA / 'adapter'}", *targets]
    with serve("demo-float32", tmp_path_factory.mktemp("server") / "log", *adapters) as url:
        yield url


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
