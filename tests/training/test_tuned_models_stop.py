"""A model tuned on answers that end with the end token learns to stop: the token as text, from a chat template, and
with ChatML's tokens added; before and after saving and loading again."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from tuned_answers import KINDS, PAIRS, check_that_it_stops, prepared, written


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(tokenizer, question: str, answer: str) -> dict[str, list[int]]:
    """The ids of a pair; the loss is that of the answer and its end."""
    ids = tokenizer(written(tokenizer, question, answer), add_special_tokens=False)["input_ids"]
    prompt = tokenizer(written(tokenizer, question), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_model_stops_by_itself(kind, tmp_path):
    tokenizer, model = prepared(kind, tmp_path / "tokenizer")
    assert len(PAIRS) == len(set(PAIRS)) == 20
    rows = [example(tokenizer, *pair) for pair in PAIRS]
    assert all(row["labels"][-1] == tokenizer.eos_token_id for row in rows)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=80,
        per_device_train_batch_size=20,
        learning_rate=5e-3,
        warmup_steps=10,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    assert [log["loss"] for log in trainer.state.log_history if "loss" in log][-1] < 0.1
    trainer.save_model(str(tmp_path / "tuned"))
    check_that_it_stops(model, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    check_that_it_stops(loaded, AutoTokenizer.from_pretrained(tmp_path / "tuned"))
