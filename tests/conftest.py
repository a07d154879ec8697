"""Lets pytest run in an untouched checkout, and hands out the two kinds of data that tests need."""

import os
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import modeling_grok1  # noqa: E402


if str(ROOT) not in modeling_grok1.__path__:
    modeling_grok1.__path__.append(str(ROOT))

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with tiny-1 and tiny-8: checkpoints in xAI's format with the outputs of xAI's own code."""
    return FIXTURES / "golden"


@pytest.fixture(scope="session")
def assets() -> Path:
    """xAI's small files (norms, routers, tokenizer.model, checkpoint-index.jsonl), read through $GROK1_ASSETS."""
    folder = os.environ.get("GROK1_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs xAI's small files: set GROK1_ASSETS to the folder that holds tokenizer.model")
    return Path(folder)
