"""llm-compressor rounds the matrices of linear experts as asked, and the folder that it saves gives the logits of the
rounded weights, without the library."""

from pathlib import Path

import pytest
import torch


pytest.importorskip("llmcompressor")

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from small_grok import prompt, save_small_grok
from transformers import AutoModelForCausalLM

import modeling_grok1  # noqa: F401


GROUP = 128
LEVELS = {8: 127.5, 4: 7.5}  # half the number of steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("small")
    return save_small_grok(out, hidden_size=128, head_dim=16, intermediate_size=256, num_hidden_layers=2)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout="linear").eval()


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric, with one scale for each group of a row."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / LEVELS[bits]
    half = 2 ** (bits - 1)
    return ((groups / scale).round().clamp(-half, half - 1) * scale).flatten(1)


@pytest.mark.parametrize("bits", LEVELS)
def test_the_folder_gives_the_logits_of_rounded_weights(bits, folder, tmp_path):
    expected = load(folder)
    matrices = {name: m for name, m in expected.named_modules() if type(m) is torch.nn.Linear}
    assert len(matrices) == 2 * (4 + 8 * 3)
    for matrix in matrices.values():
        matrix.weight.data = rounded(matrix.weight.data, bits)
    model = load(folder)
    ignored = ["lm_head", r"re:.*block_sparse_moe\.gate$"]
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=f"W{bits}A16", ignore=ignored))
    assert {name for name, module in model.named_modules() if hasattr(module, "weight_scale")} == matrices.keys()
    model.save_pretrained(tmp_path, save_compressed=True)
    with torch.no_grad():
        ids = prompt()
        torch.testing.assert_close(load(tmp_path)(ids).logits, expected(ids).logits, rtol=0, atol=1e-3)
        assert (load(folder)(ids).logits - expected(ids).logits).abs().max() > 0.01  # the rounding is seen
