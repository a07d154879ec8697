"""Experts are fused by one copy of each matrix, to the tensor that stack and concatenate would give."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist

from modeling_grok1 import Grok1ForCausalLM
from modeling_grok1.loading_grok1 import JoinHalves, StackExperts


PATTERNS = [".experts.*.w1.weight", ".experts.*.w3.weight"]
TARGETS = [".experts.gate_up_proj"]


def fused(stack, join, inputs):
    return join.convert(stack.convert(dict(inputs), PATTERNS, TARGETS), PATTERNS, TARGETS)[TARGETS[0]]


@pytest.mark.parametrize(
    ("gate", "up"), [((6, 4), (6, 4)), ((6, 4), (3, 4)), ((6, 1), (6, 1))], ids=["halves", "unequal", "scales"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_it_is_stack_and_concatenate(gate, up, dtype):
    inputs = {
        pattern: [torch.randint(-9, 9, shape).to(dtype) for _ in range(3)]
        for pattern, shape in zip(PATTERNS, (gate, up), strict=True)
    }
    actual = fused(StackExperts(0), JoinHalves(1), inputs)
    assert torch.equal(actual, fused(MergeModulelist(0), Concatenate(1), inputs))
    assert actual.is_contiguous()


def test_parts_of_another_tensor_are_concatenated():
    """Two views of one tensor that are not its halves in order."""
    whole = torch.arange(24.0).view(2, 6, 2)
    left, right = whole.split(3, dim=1)
    for parts in [(right, left), (left, left), (left[:, :2], right[:, :2])]:
        joined = JoinHalves(1).convert(dict(zip(PATTERNS, parts, strict=True)), PATTERNS, TARGETS)[TARGETS[0]]
        assert torch.equal(joined, torch.cat(parts, dim=1))


def test_a_model_is_loaded_without_concatenating(small_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Grok1ForCausalLM(small_config)
    model.save_pretrained(tmp_path)

    def cat(*args, **kwargs):
        raise AssertionError("a second copy")

    monkeypatch.setattr("transformers.core_model_loading.torch.cat", cat)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.undo()
    for (name, expected), actual in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected), name
