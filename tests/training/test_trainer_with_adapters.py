"""Trainer with LoRA, on attention and on experts, over plain, int8 and 4-bit weights: the loss falls, a checkpoint is
the adapter alone, and a resumed run has the losses of the whole one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

from grok1.training import Grok1Trainer
from modeling_grok1 import Grok1ForCausalLM, Grok1Int8Config, GrokConfig


peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["w1", "w2", "w3"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
# How the base model is loaded, and what LoRA adapts.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention": ({}, {"target_modules": ATTENTION}),
    "fused-experts": ({}, {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "linear-experts": ({"experts_layout": "linear"}, {"target_modules": EXPERTS}),
    "native-int8": (
        {"experts_layout": "linear", "quantization_config": Grok1Int8Config()},
        {"target_modules": ATTENTION + EXPERTS},
    ),
    "nf4": ({"quantization_config": NF4}, {"target_modules": ATTENTION + EXPERTS}),
}
STEPS, SAVED_AT = 16, 8
TOKENS = torch.randint(3, 96, (8, 16), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": ids, "labels": ids} for ids in TOKENS]


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
    )
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("base")
    Grok1ForCausalLM(config).save_pretrained(out)
    return out


def trainer(folder: Path, out: Path, case: str, dtype: torch.dtype = torch.float32, **options: Any) -> Grok1Trainer:
    load, adapt = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_router_logits=True, **load)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **adapt))
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=SAVED_AT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": STEPS, "logging_steps": 1, **options},
    )
    return Grok1Trainer(model=model, args=arguments, train_dataset=DATA)


def logged(run: Grok1Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_and_a_resumed_run_has_the_same_losses(folder, tmp_path, case):
    run = trainer(folder, tmp_path, case)
    frozen = {name: weight.clone() for name, weight in run.model.named_parameters() if not weight.requires_grad}
    run.train()
    losses = logged(run, "loss")
    assert len(losses) == len(logged(run, "aux_loss")) == STEPS
    assert losses[-1] < losses[0] - 0.15, losses
    for name, weight in run.model.named_parameters():
        assert weight.requires_grad or torch.equal(weight, frozen[name]), name

    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)
    assert not (checkpoint / "model.safetensors").exists()
    trainable = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    assert sum(weight.numel() for weight in saved.values()) == trainable

    resumed = trainer(folder, tmp_path / "resumed", case)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed, "loss") == losses
    assert logged(resumed, "aux_loss") == logged(run, "aux_loss")


@pytest.mark.parametrize("case", CASES)
def test_activation_checkpointing_changes_no_loss(folder, tmp_path, case):
    """The Trainer's own switch: for an adapted model it makes the embeddings require gradients too."""
    plain, checkpointed = (
        trainer(folder, tmp_path / str(on), case, activation_checkpointing=on, save_strategy="no")
        for on in (False, True)
    )
    for run in (plain, checkpointed):
        run.train()
    assert checkpointed.model.base_model.model.is_activation_checkpointing
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-4)


def test_int8_trains_in_bfloat16(folder, tmp_path):
    """As the released model would: bfloat16 around the int8 weights, adapters in float32, autocast."""
    run = trainer(folder, tmp_path, "native-int8", torch.bfloat16, bf16=True, save_strategy="no")
    assert {weight.dtype for weight in run.model.parameters() if weight.requires_grad} == {torch.float32}
    run.train()
    losses = logged(run, "loss")
    assert losses[-1] < losses[0] - 0.3, losses


def test_aux_loss_is_the_mean_since_the_last_log_and_absent_where_the_model_has_none(folder, tmp_path):
    every = trainer(folder, tmp_path / "1", "attention", save_strategy="no")
    every.train()
    expected = logged(every, "aux_loss")
    fourth = trainer(folder, tmp_path / "2", "attention", save_strategy="no", logging_steps=4)
    fourth.train()
    means = [sum(expected[i : i + 4]) / 4 for i in range(0, STEPS, 4)]
    assert logged(fourth, "aux_loss") == pytest.approx(means, rel=1e-6)

    silent = trainer(folder, tmp_path / "3", "attention", save_strategy="no")
    silent.model.base_model.model.config.output_router_logits = False
    silent.train()
    assert len(logged(silent, "loss")) == STEPS
    assert logged(silent, "aux_loss") == []


def test_with_accumulation_every_batch_adds_its_share_of_the_balance(folder, tmp_path):
    first: dict[float, dict[str, float]] = {}
    for weight in (0.0, 0.5):
        run = trainer(
            folder, tmp_path / str(weight), "attention", save_strategy="no", gradient_accumulation_steps=2, max_steps=1
        )
        run.model.base_model.model.config.router_aux_loss_coef = weight
        run.train()
        first[weight] = run.state.log_history[0]
    assert first[0.5]["aux_loss"] == first[0.0]["aux_loss"]
    assert first[0.5]["loss"] == pytest.approx(first[0.0]["loss"] + 0.5 * first[0.5]["aux_loss"], abs=1e-5)
