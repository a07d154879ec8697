"""Losses and gradients are those of each text alone: whatever side is padded, in packed and in padding-free batches,
and with the divisor of an optimizer step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from grok1.training import Grok1Trainer
from modeling_grok1 import Grok1ForCausalLM, losses_grok1


GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 96, (length,), generator=GENERATOR) for length in (3, 9, 5, 12)]
TARGETS = sum(len(text) - 1 for text in TEXTS)


@pytest.fixture
def model(small_config) -> Grok1ForCausalLM:
    torch.manual_seed(0)
    small_config.initializer_range = 0.2
    return Grok1ForCausalLM(small_config).double().train()


def padded(side: str, texts: list[torch.Tensor] = TEXTS) -> dict[str, torch.Tensor]:
    length = max(map(len, texts))
    ends = [(length - len(text), 0) if side == "left" else (0, length - len(text)) for text in texts]
    ids, mask, labels = (
        torch.stack([F.pad(row, end, value=value) for row, end in zip(rows, ends, strict=True)])
        for rows, value in ((texts, 0), ([torch.ones_like(text) for text in texts], 0), (texts, -100))
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def in_four_dimensions(side: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    batch = padded(side)
    mask = batch["attention_mask"].bool()
    T = mask.shape[1]  # noqa: N806
    sees = (torch.ones(T, T).tril().bool() & mask[:, None, :])[:, None]
    if dtype.is_floating_point:
        sees = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    return {**batch, "attention_mask": sees.to(dtype)}


def packed(how: str) -> dict[str, torch.Tensor]:
    """All texts in one row, with labels that do not know where a text begins."""
    ids = torch.cat(TEXTS)[None]
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
    lengths = torch.tensor([0, *map(len, TEXTS)])
    if how == "positions":
        batch["position_ids"] = torch.cat([torch.arange(len(text)) for text in TEXTS])[None]
    elif how == "lengths":
        starts = lengths.cumsum(0).int()
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 12, "max_length_k": 12}
    elif how == "mask":
        text = torch.repeat_interleave(torch.arange(4), lengths[1:])
        batch["attention_mask"] = ((text[:, None] == text) & torch.ones(len(text), len(text)).tril().bool())[
            None, None
        ]
        batch["position_ids"] = torch.cat([torch.arange(len(text)) for text in TEXTS])[None]
    else:
        batch = DataCollatorWithFlattening()([{"input_ids": text.tolist()} for text in TEXTS])
        batch = {**batch, "labels": ids}
    return batch


BATCHES = {
    "left": lambda: padded("left"),
    "right": lambda: padded("right"),
    "left 4-D bool": lambda: in_four_dimensions("left", torch.bool),
    "left 4-D float64": lambda: in_four_dimensions("left", torch.float64),
    "right 4-D int": lambda: in_four_dimensions("right", torch.int64),
    **{f"packed {how}": lambda how=how: packed(how) for how in ("positions", "lengths", "mask", "collator")},
}


# The angles of rotary positions are float32, and padding on the left moves them.
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def of_each_text(model, divisor: int):
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for text in TEXTS:
        logits = model(text[None]).logits[0, :-1].float()  # the loss is float32
        loss = F.cross_entropy(logits, text[1:], reduction="sum") / divisor
        loss.backward()
        total += loss.detach()
    return total.float(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("divisor", [None, TARGETS, 1000])
@pytest.mark.parametrize("kind", BATCHES)
def test_every_batch_has_the_loss_and_gradients_of_its_texts(
    model, kind, divisor, use_cache, skip_logits, monkeypatch
):
    monkeypatch.setattr(losses_grok1, "LOGIT_BYTES", 4 * 96 * 7)  # 7 rows
    loss, gradients = of_each_text(model, divisor or TARGETS)
    options: dict[str, Any] = {} if divisor is None else {"num_items_in_batch": torch.tensor(divisor)}
    actual_loss, actual = loss_and_gradients(
        model, BATCHES[kind](), use_cache=use_cache, skip_logits=skip_logits, **options
    )
    torch.testing.assert_close(actual_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(actual[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[PAD]": 0, **{f"w{i}": i for i in range(1, 96)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")), pad_token="[PAD]", padding_side="left"
    )


def trained(kind: type[Trainer], model: Any, tokenizer: Any, out: Path, accumulate: int, **options: Any):
    """The first logged loss, and the gradients of the first optimizer step."""
    arguments = TrainingArguments(
        str(out),
        max_steps=1,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    run = kind(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": text.tolist()} for text in TEXTS],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    gradients: dict[str, torch.Tensor] = {}
    step = run.create_optimizer().step

    def record(*args, **kwargs):
        gradients.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        return step(*args, **kwargs)

    run.optimizer.step = record
    run.train()
    return next(entry["loss"] for entry in run.state.log_history if "loss" in entry), gradients


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("kind", "accumulate"), [(Trainer, 1), (Grok1Trainer, 1), (Grok1Trainer, 2)])
def test_the_trainer_pads_on_either_side(model, tokenizer, tmp_path, kind, accumulate, side):
    loss, expected = of_each_text(model, TARGETS)
    tokenizer.padding_side = side
    actual, gradients = trained(kind, model, tokenizer, tmp_path, accumulate)
    assert actual == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_smoothed_loss_pads_on_either_side(model, tokenizer, tmp_path, accumulate):
    with torch.no_grad():
        outputs = {"logits": model(**{k: v for k, v in padded("right").items() if k != "labels"}).logits}
    expected = LabelSmoother(0.1)(outputs, padded("right")["labels"], shift_labels=True).item()
    loss, _ = trained(Grok1Trainer, model, tokenizer, tmp_path, accumulate, label_smoothing_factor=0.1)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_the_balance_of_accumulated_batches_weighs_as_in_one_large_batch(model):
    """Four equal parts: the load-balancing loss of each is that of all."""
    batch = padded("left", TEXTS[1:2])
    whole = {name: tensor.repeat(4, 1) for name, tensor in batch.items()}
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    loss, expected = loss_and_gradients(model, whole)
    model.zero_grad()
    total = 0.0
    for _ in range(4):
        part = model(**batch, num_items_in_batch=4 * 8).loss
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_batch_without_targets_changes_nothing(model, skip_logits):
    batch = padded("left", [TEXTS[0][:1], TEXTS[1][:1]])
    loss, gradients = loss_and_gradients(model, batch, num_items_in_batch=7, skip_logits=skip_logits)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())
