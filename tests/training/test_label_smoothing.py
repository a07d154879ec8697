"""transformers.Trainer smooths the loss of the next token, whatever wraps the model, and our Trainer keeps the balance
of the experts in a smoothed loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments
from transformers.models.auto import modeling_auto

from grok1.training import Grok1Trainer
from modeling_grok1 import Grok1ForCausalLM, Grok1ForSequenceClassification, Grok1ForTokenClassification


TOKENS = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
SMOOTHING = 0.1


@pytest.fixture
def model(small_config) -> Grok1ForCausalLM:
    torch.manual_seed(0)
    small_config.initializer_range = 0.2
    return Grok1ForCausalLM(small_config)


def first_loss(kind: type[Trainer], model: Any, out: Path, **options: Any) -> float:
    arguments = TrainingArguments(
        str(out),
        label_smoothing_factor=SMOOTHING,
        max_steps=1,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    run = kind(model=model, args=arguments, train_dataset=data, **options)
    run.train()
    return next(entry["loss"] for entry in run.state.log_history if "loss" in entry)


def smoothed(model: Any) -> float:
    with torch.no_grad():
        logits = model(TOKENS).logits[:, :-1].reshape(-1, 96)
    return F.cross_entropy(logits, TOKENS[:, 1:].reshape(-1), label_smoothing=SMOOTHING).item()


@pytest.mark.parametrize("kind", [Trainer, Grok1Trainer])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_smoothed_loss_is_that_of_the_next_token(model, tmp_path, kind, adapted):
    expected = smoothed(model)
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert first_loss(kind, model, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_the_balance_of_the_experts_stays_in_the_smoothed_loss(model, tmp_path):
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    with torch.no_grad():
        aux_loss = model(TOKENS).aux_loss.item()
    expected = smoothed(model) + 0.5 * aux_loss
    assert first_loss(Grok1Trainer, model, tmp_path) == pytest.approx(expected, rel=1e-5)


def test_every_class_is_in_the_table_of_its_task():
    for model_class in (Grok1ForCausalLM, Grok1ForSequenceClassification, Grok1ForTokenClassification):
        tables = [
            name
            for name, table in vars(modeling_auto).items()
            if name.endswith("_MAPPING_NAMES") and model_class.__name__ in table.values()
        ]
        assert len(tables) == 1
        assert (
            tables[0].replace("_", "").lower().startswith("model" + model_class.__name__.removeprefix("Grok1").lower())
        )
