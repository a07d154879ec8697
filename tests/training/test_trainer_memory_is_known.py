"""docs/training.md, the memory of the released model row by row, from the meta model and PEFT's own layers."""

from pathlib import Path

import pytest
import torch

from grok1.sizing.memory import model_memory
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


peft = pytest.importorskip("peft")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Precision of the base model, and what LoRA adapts.
ADAPTED = {
    "LoRA on attention, bfloat16": ("bfloat16", ATTENTION),
    "LoRA on everything, bfloat16": ("bfloat16", "all-linear"),
    "LoRA on everything, int8": ("int8", "all-linear"),
    "LoRA on everything, nf4": ("nf4", "all-linear"),
    "LoRA on everything, nf4, double": ("nf4-double", "all-linear"),
}


@pytest.fixture(scope="module")
def adapters() -> dict[str, int]:
    """Parameters of rank-16 adapters by what they adapt: the meta model of one layer, times its layers."""
    counts = {}
    for targets in (ATTENTION, "all-linear"):
        with torch.device("meta"):
            model = Grok1ForCausalLM(GrokConfig(num_hidden_layers=1), experts_layout="linear")
            model = peft.get_peft_model(
                model, peft.LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"), low_cpu_mem_usage=True
            )
        one = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        counts[str(targets)] = one * GrokConfig().num_hidden_layers
    return counts


def row(name: str, frozen: float, trained: int, bytes_each: int) -> str:
    moving = trained * bytes_each
    together = f"{(frozen + moving) / 1e9:,.1f}"
    return f"| {name} | {frozen / 1e9:,.1f} | {trained:,} | {moving / 1e9:,.1f} | {together} |"


def test_the_memory_table_is_computed(adapters):
    text = PAGE.read_text(encoding="utf-8")
    memory = {key: model_memory(GrokConfig(), key, prompt=1) for key in {key for key, _ in ADAPTED.values()}}
    whole = memory["bfloat16"].parameters
    # A weight, its gradient and two moments: in float32 with autocast, or all in bfloat16.
    rows = [row("all weights, float32", 0, whole, 4 * 4), row("all weights, bfloat16", 0, whole, 4 * 2)]
    rows += [
        row(name, memory[key].weights_bytes, adapters[str(targets)], 4 * 4) for name, (key, targets) in ADAPTED.items()
    ]
    for line in rows:
        assert line in text, "\n".join(rows)


def test_what_fused_experts_cost_is_computed():
    config = GrokConfig()
    layer = 2 * config.num_experts * 3 * config.intermediate_size * config.hidden_size
    assert f"{layer / 1e9:.1f} GB more a layer in bfloat16" in PAGE.read_text(encoding="utf-8")
