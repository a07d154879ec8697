"""Twenty questions with answers, a small model to tune on them, and whether it has learnt to end an answer."""

from pathlib import Path

import torch
from small_grok import SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

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
KINDS = ("text", "chat", "chatml")


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


def check_that_it_stops(model, tokenizer) -> None:
    """Every answer is given to the letter, and ends with the end token."""
    prompts = [written(tokenizer, question) for question, _ in PAIRS]
    batch = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")
    output = model.eval().generate(**batch, max_new_tokens=60, do_sample=False)
    new = output[:, batch["input_ids"].shape[1] :]
    assert new.shape[1] < 60 and (new == tokenizer.eos_token_id).sum(1).tolist() == [1] * len(PAIRS)
    for text, prompt, (_, answer) in zip(tokenizer.batch_decode(output), prompts, PAIRS, strict=True):
        assert text.replace("[PAD]", "").removeprefix(" ") == prompt + answer + tokenizer.eos_token
