"""A model tuned on answers that end with the end token learns to stop: the token as text, from a chat template, and
with ChatML's tokens added; before and after saving and loading again."""

from pathlib import Path

import pytest
import torch
from small_grok import SIZES
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

import grok1
from grok1.conversion.tokenizer import convert_tokenizer
from modeling_grok1 import GrokConfig


DEMO = Path(grok1.__file__).parent / "demo"
NAMES = ["Romeo", "Juliet", "Hamlet", "Ophelia", "Lear", "Cordelia", "Othello", "Iago", "Brutus", "Cassius"]
PLACES = ["Verona", "Elsinore", "Venice", "Rome", "Dover"]
PAIRS = [
    (f"Where is {name} {time}?", f" {name} is in {PLACES[(3 * i + j) % 5]}.")
    for i, name in enumerate(NAMES)
    for j, time in enumerate(("today", "at night"))
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'Q: ' + message.content + '\nA:' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prepared(kind: str, folder: Path):
    """A tokenizer of `kind`, and a small untrained Grok-1 for its tokens."""
    convert_tokenizer(DEMO / "tokenizer.model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(0)
    config = GrokConfig(**{**SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": 2, "initializer_range": 0.125})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if kind == "chat":
        tokenizer.chat_template = PLAIN_CHAT
    if kind == "chatml":
        tokenizer.chat_template = CHATML
        tokenizer.add_special_tokens(
            {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tokenizer, model


def written(tokenizer, question: str, answer: str | None = None) -> str:
    """The text of a prompt, or of a prompt with its answer and its end, as trainers write it."""
    if tokenizer.chat_template is None:
        return question if answer is None else question + answer + tokenizer.eos_token
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)


def example(tokenizer, question: str, answer: str) -> dict[str, list[int]]:
    """The ids of a pair; the loss is that of the answer and its end."""
    ids = tokenizer(written(tokenizer, question, answer), add_special_tokens=False)["input_ids"]
    prompt = tokenizer(written(tokenizer, question), add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


@pytest.mark.parametrize("kind", ["text", "chat", "chatml"])
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
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for tuned, its_tokenizer in ((model, tokenizer), (loaded, AutoTokenizer.from_pretrained(tmp_path / "tuned"))):
        tuned.eval()
        prompts = [written(its_tokenizer, question) for question, _ in PAIRS]
        batch = its_tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
        output = tuned.generate(**batch, max_new_tokens=60, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        assert new.shape[1] < 60 and (new == its_tokenizer.eos_token_id).sum(1).tolist() == [1] * len(PAIRS)
        for text, prompt, (_, answer) in zip(its_tokenizer.batch_decode(output), prompts, PAIRS, strict=True):
            text = text.replace("[PAD]", "")
            assert text.removeprefix(" ") == prompt + answer + its_tokenizer.eos_token
