"""Adapters on the embedding keep its multiplier: untrained ones change nothing, and merging trained ones changes
nothing either, where the head is not tied to what is merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_grok import prompt, save_small_grok
from torch import nn
from transformers import AutoModelForCausalLM


peft = pytest.importorskip("peft")

IDS = torch.cat([torch.tensor([[5]]), prompt(11), torch.tensor([[5]])], dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_grok(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def train(model: Any, part: str) -> None:
    """Random values for what an adapter learns."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_one_trained_token(folder):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5])
    model = peft.get_peft_model(load(folder), config).eval()
    torch.testing.assert_close(logits(model), logits(load(folder)), rtol=0, atol=1e-5)
    train(model, "trainable_tokens_delta")
    trained = logits(model)
    assert (trained - logits(load(folder))).abs().max() > 0.1
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=0, atol=1e-4)


def test_lora_on_the_embedding(folder):
    untied = {"tie_word_embeddings": False}  # PEFT merges into the shared matrix, and then changes the head too
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    model = peft.get_peft_model(load(folder, **untied), config).eval()
    torch.testing.assert_close(logits(model), logits(load(folder)), rtol=0, atol=1e-5)
    train(model, "lora_embedding")
    trained = logits(model)
    assert (trained - logits(load(folder))).abs().max() > 0.1
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=0, atol=1e-4)


def test_a_plain_embedding_is_given_the_multiplier(folder):
    model = load(folder)
    embedding = nn.Embedding(320, 64)
    embedding.weight.data.copy_(model.get_input_embeddings().weight)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings().weight is embedding.weight
    assert torch.equal(logits(model), logits(load(folder)))
