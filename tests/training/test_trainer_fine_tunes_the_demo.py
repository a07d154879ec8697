"""transformers.Trainer fine-tunes the bundled demo on a text that it does not know, with the balance of the routers in
its logs, and resumes from a checkpoint with the losses of the run that was not interrupted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import grok1
from grok1.conversion.convert import convert
from grok1.training import Grok1Trainer


PACKAGE = Path(grok1.__file__).parent
# A text of another kind than the plays that the demo was trained on: 3,900 tokens of legal English.
TEXT = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
WINDOW, BATCH = 64, 2
STEPS, SAVED_AT = 200, 140
HELD_OUT = 8  # windows at the end of the text


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model is fastest on one thread, and then its sums have one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "hf"
    convert(PACKAGE / "demo", out, dtype="float32")
    return out


@pytest.fixture(scope="module")
def windows(folder: Path) -> list[dict[str, torch.Tensor]]:
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    return [{"input_ids": window, "labels": window} for window in ids.split(WINDOW) if len(window) == WINDOW]


def trainer(folder: Path, out: Path, windows: list[dict[str, torch.Tensor]], **options: Any) -> Grok1Trainer:
    """A trainer of the demo that records the batches that it trains on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_router_logits=True)
    model.config.router_aux_loss_coef = 0.02
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=1,
        save_steps=SAVED_AT,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    made = Grok1Trainer(
        model=model, args=arguments, train_dataset=windows[:-HELD_OUT], eval_dataset=windows[-HELD_OUT:]
    )
    batches: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"]) if module.training else None, with_kwargs=True
    )
    made.batches = batches
    return made


@pytest.fixture(scope="module")
def whole(folder, windows, tmp_path_factory):
    """A run without a break, and the loss on the held-out windows before and after it."""
    run = trainer(folder, tmp_path_factory.mktemp("whole"), windows)
    before = run.evaluate()["eval_loss"]
    run.train()
    return run, before, run.evaluate()["eval_loss"]


def logged(run: Grok1Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def test_the_loss_falls_on_what_it_reads_and_on_what_it_does_not(whole):
    run, before, after = whole
    losses = logged(run, "loss")
    assert len(losses) == STEPS
    mean = [sum(part) / len(part) for part in (losses[:10], losses[-10:])]
    assert mean[0] - mean[1] > 2.5, mean  # nats
    assert before - after > 1.5, (before, after)


def test_every_log_has_the_balance_of_the_routers_beside_the_loss(whole, folder):
    run, *_ = whole
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("aux_loss" in entry for entry in entries)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model(run.batches[0], labels=run.batches[0], output_router_logits=True)
        plain = model(run.batches[0], labels=run.batches[0]).loss
    assert entries[0]["aux_loss"] == pytest.approx(output.aux_loss.item(), rel=1e-6)
    assert entries[0]["loss"] == pytest.approx(plain.item() + 0.02 * output.aux_loss.item(), rel=1e-6)
    assert all(1.9 < entry["aux_loss"] < 3 for entry in entries)  # 2 where all experts get as much


def test_every_parameter_was_trained_and_the_saved_model_is_the_trained_one(whole, folder, tmp_path, windows):
    run, _, after = whole
    untrained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in run.model.state_dict().items():
        moved = (weight - untrained[name]).flatten(1).abs().amax(-1) if weight.ndim == 3 else weight != untrained[name]
        assert moved.bool().all() if weight.ndim == 3 else moved.any(), name  # each expert of a fused parameter
    run.save_model(tmp_path)
    again = trainer(tmp_path, tmp_path / "again", windows)
    assert again.evaluate()["eval_loss"] == pytest.approx(after, abs=1e-6)


def test_a_resumed_run_has_the_batches_and_the_losses_of_the_whole_one(whole, folder, windows, tmp_path):
    run, *_ = whole
    resumed = trainer(folder, tmp_path, windows)
    resumed.train(resume_from_checkpoint=str(Path(run.args.output_dir) / f"checkpoint-{SAVED_AT}"))
    assert len(resumed.batches) == STEPS - SAVED_AT
    for actual, expected in zip(resumed.batches, run.batches[SAVED_AT:], strict=True):
        assert torch.equal(actual, expected)
    for key in ("loss", "aux_loss", "grad_norm", "learning_rate"):
        assert logged(resumed, key) == logged(run, key), key
    weights = resumed.model.state_dict()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
