"""The demo as a hub folder, as GGUF, and in llama.cpp; and the table of what was measured."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from runtime import Runtime, run_converter

from grok1.conversion.convert import convert
from modeling_grok1 import Grok1ForCausalLM


# The hard strings of the tokenizer's own tests.
sys.path.append(str(Path(__file__).resolve().parents[1] / "conversion"))
DEMO = Path(__file__).resolve().parents[2] / "grok1" / "demo"
MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """hub("float32", "1MB"): the folder that `grok1 convert` writes of the demo."""

    @cache
    def folder(dtype: str = "float32", max_shard_size: str = "5GB", layout: str = "hub") -> Path:
        out = tmp_path_factory.mktemp("hub") / f"grok-1-demo-{dtype}"
        convert(DEMO, out, dtype=dtype, max_shard_size=max_shard_size, layout=layout)
        return out

    return folder


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    """gguf(folder, "q8_0"): what llama.cpp's converter makes of a hub folder."""

    @cache
    def convert_to(folder: Path, outtype: str) -> Path:
        file = tmp_path_factory.mktemp("gguf") / f"{outtype}.gguf"
        done = run_converter(folder, file, "--outtype", outtype)
        assert done.returncode == 0, done.stderr
        return file

    return convert_to


@pytest.fixture(scope="session")
def runtime() -> Callable[..., Runtime]:
    """runtime(file, torch.float16): a GGUF file in llama.cpp, with the cache in that dtype."""
    return cache(Runtime)


@pytest.fixture(scope="session")
def load() -> Callable[[Path], Grok1ForCausalLM]:
    """load(folder): a model of its own, in float32, an `nn.Linear` a matrix."""
    torch.set_num_threads(1)

    def from_pretrained(folder: Path) -> Grok1ForCausalLM:
        return Grok1ForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout="linear").eval()

    return from_pretrained


@pytest.fixture(scope="session")
def passages() -> list[dict[str, str]]:
    """What the demo recites: `opening` and `continuation`."""
    return json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """measured("row"): adds a row to the table that is printed at the end."""
    return pytestconfig.stash.setdefault(MEASURED, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(MEASURED, [])
    if rows:
        terminalreporter.section("measured (the tables of docs/interop.md)")
        for row in rows:
            terminalreporter.write_line(row)
