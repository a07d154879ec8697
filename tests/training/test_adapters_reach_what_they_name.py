"""PEFT on what is easily missed: `all-linear` with fused experts, adapters of one layout in the other, an adapter for
each sequence of a batch, the tied head, and an adapter without a task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


peft = pytest.importorskip("peft")

TOKENS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GrokConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        max_position_embeddings=128,
        attn_output_multiplier=32**-0.5,
        embedding_multiplier_scale=8.0,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("base")
    Grok1ForCausalLM(config).save_pretrained(out)
    return out


def base(folder: Path, layout: str = "fused") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_layout=layout)


def lora(targets: str | list[str], task: str | None = "CAUSAL_LM") -> Any:
    """Not zero, as LoRA begins, so that an adapter that is missed is seen."""
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type=task)


@torch.no_grad()
def run(model: Any, **options: Any) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS, **options).logits


@pytest.mark.parametrize("layout", ["fused", "linear"])
@pytest.mark.parametrize("targets", ["all-linear", ["w1", "w2", "w3"]], ids=["all-linear", "names"])
def test_the_experts_are_adapted_in_both_layouts(folder, tmp_path, layout, targets):
    plain = run(base(folder, layout))
    model = peft.get_peft_model(base(folder, layout), lora(targets))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    for i in range(2):
        factors = [name for name in trained if f"layers.{i}.block_sparse_moe.experts" in name]
        # Two parameters of all experts, or three matrices of each of four, with two factors.
        assert len(factors) == 2 * (2 if layout == "fused" else 3 * 4)
    assert any("q_proj" in name for name in trained) == (targets == "all-linear")
    expected = run(model)
    assert (expected - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    for other in ("fused", "linear") if layout == "linear" else ("fused",):
        loaded = peft.PeftModel.from_pretrained(base(folder, other), tmp_path)
        torch.testing.assert_close(run(loaded), expected, **CLOSE)
    torch.testing.assert_close(run(model.merge_and_unload()), expected, **CLOSE)


@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_each_sequence_of_a_batch_has_its_own_adapter(folder, layout):
    """Fused experts are reached by `target_parameters`, which PEFT does not mix: there the attention alone."""
    targets = {"fused": ["q_proj", "o_proj"], "linear": "all-linear"}[layout]
    model = peft.get_peft_model(base(folder, layout), lora(targets), adapter_name="first")
    model.add_adapter("second", lora(["q_proj", "w2"] if layout == "linear" else ["k_proj"]))
    names = ["first", "second", "__base__", "first"]
    mixed = run(model, adapter_names=names)
    for name in ("first", "second"):
        model.set_adapter(name)
        chosen = [i for i, other in enumerate(names) if other == name]
        torch.testing.assert_close(mixed[chosen], run(model)[chosen], **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], run(model)[2], **CLOSE)
    assert (mixed[0] - run(model)[0]).abs().max() > 0.1

    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(input_ids=TOKENS, adapter_names=names, **greedy)
    model.set_adapter("first")
    assert generated[0].tolist() == model.generate(input_ids=TOKENS[:1], **greedy)[0].tolist()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapted_head_or_embedding_is_no_longer_tied(folder, tmp_path, targets):
    model = peft.get_peft_model(base(folder), lora(targets))
    expected = run(model)
    assert (expected - run(base(folder))).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base(folder), tmp_path / "adapter")
    torch.testing.assert_close(run(loaded), expected, **CLOSE)

    merged = model.merge_and_unload()
    torch.testing.assert_close(run(merged), expected, **CLOSE)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not reloaded.config.tie_word_embeddings
    torch.testing.assert_close(run(reloaded), expected, **CLOSE)


def test_an_adapter_without_a_task_says_how_it_is_loaded(folder, tmp_path):
    model = peft.get_peft_model(base(folder), lora(["q_proj"], task=None))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"specify `import_allowlist=\['modeling_grok1.modeling_grok1'\]`"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, import_allowlist=["modeling_grok1"])
    torch.testing.assert_close(run(loaded), run(model), **CLOSE)
