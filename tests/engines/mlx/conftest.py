"""Folders that folders.py wrote, in an environment that has mlx-lm and neither torch nor this package."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer


ROOT = Path(__file__).resolve().parents[3]
FOLDERS = Path(os.environ.get("GROK1_MLX_FOLDERS", ROOT / ".cache" / "mlx" / "folders"))


@pytest.fixture(scope="session")
def folder() -> Callable[[str], Path]:
    """folder("demo"): one of the folders listed in folders.py."""
    return lambda name: FOLDERS / name


@pytest.fixture(scope="session")
def load() -> Callable[..., nn.Module]:
    """load(folder): a model of its own. load(folder, dtype="float32"): in another dtype than that of config.json."""
    return lambda path, **config: load_model(path, model_config=config, trust_remote_code=True)[0]


@pytest.fixture(scope="session")
def demo(load: Callable[..., nn.Module]) -> nn.Module:
    """The demo in float32. Tests must leave it as it is."""
    return load(FOLDERS / "demo")


@pytest.fixture(scope="session")
def tokenizer() -> TokenizerWrapper:
    return load_tokenizer(FOLDERS / "demo", {"trust_remote_code": True})


@pytest.fixture(scope="session")
def passages() -> list[dict[str, str]]:
    """What the demo recites: `opening` and `continuation`."""
    return json.loads((ROOT / "grok1" / "demo" / "passages.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def reference() -> Callable[[str], dict[str, np.ndarray]]:
    """reference("tiny-8"): `tokens`, `logits`, `prompt`, `greedy`, `greedy_logits` of xAI's own code in float32."""

    @cache
    def read(name: str) -> dict[str, np.ndarray]:
        (file,) = (ROOT / "tests" / "fixtures" / "golden" / name).glob("ref_fp32_*.npz")
        with np.load(file) as arrays:
            return {key: arrays[key].astype(np.float32 if "logits" in key else np.int32) for key in arrays}

    return read


@pytest.fixture(scope="session")
def mlx_lm() -> Callable[..., str]:
    """mlx_lm("generate", "--model", folder, ...): the command, with --trust-remote-code; returns what it prints."""

    def run(command: str, *options: Any, trusted: bool = True) -> str:
        line = [str(Path(sys.executable).parent / f"mlx_lm.{command}"), *map(str, options)]
        done = subprocess.run(
            [*line, *(["--trust-remote-code"] if trusted else [])], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def greedy(model: nn.Module, prompt: list[int], steps: int, prompt_cache: list[Any] | None = None) -> list[int]:
    """The likeliest tokens after `prompt`, step by step with the model itself rather than mlx-lm's generation.

    Args:
        prompt_cache: one of mlx-lm's, which may hold what precedes `prompt`; by default a new one.
    """
    cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    said: list[int] = []
    ids = prompt
    for _ in range(steps):
        said.append(mx.argmax(model(mx.array([ids]), cache)[0, -1]).item())
        ids = said[-1:]
    return said
