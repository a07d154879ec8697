"""The data that tests need."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_grok1 import GrokConfig


ROOT = Path(__file__).resolve().parent.parent

# Transformers' own tests, llama.cpp and vLLM are run only when `make conformance`, `interop` and `test-vllm` ask.
# mlx-lm's run without this file, in `make test-mlx`.
collect_ignore = [name for name in ("conformance", "interop", "vllm") if not os.environ.get(f"GROK1_{name.upper()}")]
collect_ignore.append("mlx")

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


@dataclass(frozen=True)
class Reference:
    """What xAI's own code computes with a golden checkpoint.

    Args:
        tokens: (3, 32), rows 1 and 2 padded with token 0 on the right, which xAI masks.
        logits: (3, 32, V), float32, at the padded positions too.
        prompt: (1, 12).
        greedy: (20,), decoded after the prompt with xAI's cache.
        greedy_logits: (20, V), from which the greedy tokens were taken.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    prompt: torch.Tensor
    greedy: torch.Tensor
    greedy_logits: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor:
        return (self.tokens != 0).long()


@pytest.fixture(scope="session")
def reference(golden: Path) -> Callable[[str, str], Reference]:
    """reference("tiny-8", "fp32"): the reference of a golden checkpoint, computed in float32 or bfloat16 ("bf16")."""

    @cache
    def load(name: str, precision: str) -> Reference:
        (file,) = (golden / name).glob(f"ref_{precision}_*.npz")
        arrays = np.load(file)
        ids = {key: torch.from_numpy(arrays[key].astype(np.int64)) for key in ("tokens", "prompt", "greedy")}
        logits = {key: torch.from_numpy(arrays[key].astype(np.float32)) for key in ("logits", "greedy_logits")}
        return Reference(**ids, **logits)

    return load


@pytest.fixture(scope="session")
def converted(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """converted("tiny-8", "float32"): the folder that `grok1 convert` writes of a golden checkpoint."""

    @cache
    def folder(name: str, dtype: str) -> Path:
        from grok1.conversion.convert import convert

        out = tmp_path_factory.mktemp(f"{name}-{dtype}") / "converted"
        # The groups divide every scale block.
        group_sizes = {"int8": {"tiny-1": 16, "tiny-8": 2}, "int4": {"tiny-1": 16, "tiny-8": 16}}
        group_size = group_sizes.get(dtype, {}).get(name)
        convert(golden / name, out, dtype=dtype, group_size=group_size, no_tokenizer=True)
        return out

    return folder


@pytest.fixture
def small_config() -> GrokConfig:
    """A Grok-1 of two small layers, for tests that need no trained or golden weights."""
    return GrokConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        attn_output_multiplier=8**-0.5,
        embedding_multiplier_scale=32**0.5,
    )


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """read_tensors(folder): every tensor of a folder's safetensors by its name."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(file))
        return tensors

    return read


@pytest.fixture(scope="session")
def aliased(
    converted: Callable[[str, str], Path],
    read_tensors: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str, str], Path]:
    """aliased("tiny-1", "float32", "keyfan"): a converted folder under the names of another repository."""

    @cache
    def folder(name: str, dtype: str, layout: str) -> Path:
        from grok1.conversion.names import hub_tensors

        source = converted(name, dtype)
        config = GrokConfig.from_pretrained(source)
        theirs = {
            tensor.parts: key for key, tensor in hub_tensors(config, layout, dtype).items() if key != "lm_head.weight"
        }
        tensors = read_tensors(source)
        renamed = {"lm_head.weight": tensors.pop("lm_head.weight")}
        ours = hub_tensors(config, "hub", dtype)
        renamed.update({theirs[ours[key].parts]: tensor for key, tensor in tensors.items()})
        out = tmp_path_factory.mktemp(f"{name}-{dtype}-{layout}")
        save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(out)
        return out

    return folder


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU computes a prompt as a GPU and the meta device do: larger pieces of scores, all experts at once."""
    from transformers.integrations.moe import ExpertsInterface

    from modeling_grok1 import attention_grok1, experts_grok1

    monkeypatch.setitem(attention_grok1.SCORE_BYTES, "cpu", attention_grok1.SCORE_BYTES_ELSEWHERE)
    grouped = ExpertsInterface()["grouped_mm"]
    monkeypatch.setitem(experts_grok1.ALL_EXPERTS_FUNCTIONS, experts_grok1.DEFAULT_EXPERTS, grouped)
