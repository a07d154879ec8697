"""A folder of the Trainer becomes a repository by `grok1 card` and `grok1 push`, and no pickle is sent."""

import json

import pytest
import torch
from fake_hub import FakeHub
from local_server import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from typer.testing import CliRunner

from grok1.cli import app
from grok1.conversion.convert import convert
from grok1.model_card.hub import left_here, upload_plan
from grok1.training import Grok1Trainer


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Three steps of the demo; the folder is the Trainer's own, with a checkpoint in it."""
    base = tmp_path_factory.mktemp("tuned") / "grok-1-demo"
    convert(DEMO, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, output_router_logits=True)
    ids = torch.tensor(tokenizer("Licensed under the Apache License, Version 2.0. " * 4)["input_ids"])
    data = [{"input_ids": window, "labels": window} for window in ids.split(16) if len(window) == 16]
    out = base.parent / "out"
    arguments = TrainingArguments(str(out), max_steps=3, logging_steps=1, save_steps=2, report_to=[], use_cpu=True)
    trainer = Grok1Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return out


def grok1(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_push_names_the_command_that_writes_what_is_missing(tuned):
    (tuned / "README.md").unlink(missing_ok=True)
    refused = grok1("push", tuned, "me/tuned", "--dry-run", code=1)
    for name in ("README.md", "LICENSE"):
        assert f"{name}: missing; `grok1 card {tuned}` writes it" in refused.output


def test_card_and_push(tuned, monkeypatch):
    said = grok1("card", tuned).stdout
    assert f"Next: grok1 push {tuned} USER/NAME --dry-run" in said and (tuned / "LICENSE").is_file()
    text = (tuned / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned from grok-1-demo" in text and "3 steps" in text and "| aux_loss |" in text
    assert left_here(tuned) == ["checkpoint-2", "checkpoint-3", "training_args.bin"]
    shown = grok1("push", tuned, "me/tuned", "--dry-run").stdout
    assert "Not sent: training_args.bin" in shown and "nothing was sent" in shown
    with FakeHub() as hub:
        hub.patch(monkeypatch)
        grok1("push", tuned, "me/tuned")
        files = hub.files("me/tuned")
    assert set(files) == {upload.path for upload in upload_plan(tuned)}
    assert not any(name.startswith("checkpoint") or name.endswith(".bin") for name in files)
    assert 'repo = "me/tuned"' in files["README.md"].read().decode()
    assert {"tokenizer.json", "modeling_grok1.py", "training_run.json"} <= set(files)


def test_the_record_has_no_path_and_the_whole_log(tuned):
    record = json.loads((tuned / "training_run.json").read_text())
    assert record["base_model"] == "grok-1-demo" and record["global_step"] == 3
    assert record["trained_parameters"] == record["parameters"] == 7_221_504
    assert [entry["step"] for entry in record["log_history"] if "loss" in entry] == [1, 2, 3]
    assert str(tuned.parent) not in (tuned / "training_run.json").read_text()
