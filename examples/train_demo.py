"""Train the demonstration checkpoint that the package ships, with this package's own model and transformers.Trainer.

    python examples/train_demo.py --text tinyshakespeare.txt --out out/demo

The text is the usual 1.1 MB of Shakespeare (any plain text that contains the passages will do). OUT receives what lies
in modeling_grok1/demo: ckpt-0/ in xAI's on-disk format, config.json, tokenizer.model, passages.json and training.json;
OUT/hf keeps the float32 model as trained. The checkpoint is then converted back, and the run fails unless it recites
every passage in float32 and in bfloat16 and uses all of its experts. About twenty minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modeling_grok1 import Grok1ForCausalLM, GrokConfig


DEMO = Path(__file__).resolve().parent.parent / "modeling_grok1" / "demo"
PRESET = Path(__file__).resolve().parent.parent / "configuration" / "demo.json"

# The user-defined pieces of xAI's own tokenizer, in its order.
USER_DEFINED = [
    *("\n" * n for n in range(1, 11)),
    *(str(digit) for digit in range(10)),
    *("\t" * n for n in range(1, 9)),
    *(" " * n for n in range(2, 17)),
    *("<|separator|>", "<|mask|>"),
    *(f"<|control{n}|>" for n in range(1, 21)),
]


@dataclass(frozen=True)
class Settings:
    """All that shapes the result, beside the text, the passages and configuration/demo.json."""

    seed: int = 0
    steps: int = 1600
    batch_size: int = 8  # windows a step
    window: int = 256  # tokens
    passage_share: float = 0.2  # of the windows begin at a passage, with nothing before it
    learning_rate: float = 2e-3  # at the end of the warm-up; cosine to a tenth of it
    warmup_steps: int = 100
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    router_aux_loss_coef: float = 0.1
    # 1/sqrt(D): embeddings times sqrt(D) have unit variance, as the normed output of every block has, and the loss
    # begins at ln V.
    initializer_range: float = 128**-0.5
    scale_blocks: int = 8


def train_tokenizer(text: str, vocab_size: int) -> bytes:
    """A SentencePiece BPE model with the options of xAI's: byte fallback, the same user-defined pieces and ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=USER_DEFINED,
        **{f"{name.lower()}_id": i for i, name in enumerate(("PAD", "BOS", "EOS", "UNK"))},
        **{f"{name.lower()}_piece": f"[{name}]" for name in ("PAD", "BOS", "EOS", "UNK")},
        unk_surface="[UNK]",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Windows(Dataset):
    """Windows of the text at random places, mixed with windows that begin at a passage (W token ids each)."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, text: str, openings: list[str], s: Settings):
        self.window = s.window
        self.text = torch.tensor(tokenizer.encode(text))
        begins = [text.index(opening) for opening in openings]
        # Encoded from its own beginning, as a prompt is: with the dummy prefix in front.
        self.passages = [torch.tensor(tokenizer.encode(text[i : i + 8 * s.window])[: s.window]) for i in begins]
        generator = torch.Generator().manual_seed(s.seed)
        size = s.steps * s.batch_size
        self.offsets = torch.randint(len(self.text) - s.window, (size,), generator=generator).tolist()
        is_passage = torch.rand(size, generator=generator) < s.passage_share
        which = torch.randint(len(self.passages), (size,), generator=generator)
        self.choices = torch.where(is_passage, which, -1).tolist()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        offset, choice = self.offsets[i], self.choices[i]
        ids = self.passages[choice] if choice >= 0 else self.text[offset : offset + self.window]
        return {"input_ids": ids, "labels": ids}


class LayerwiseBalanceTrainer(Trainer):
    """Balances the experts of each layer. The model's own loss pools the layers, as Mixtral's does, so that an expert
    that idles in one layer hides behind its namesake in another."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, config = model(**inputs), model.config
        layerwise = torch.stack(
            [
                load_balancing_loss_func((logits,), config.num_experts, config.num_experts_per_tok)
                for logits in outputs.router_logits
            ]
        ).mean()
        loss = outputs.loss + config.router_aux_loss_coef * (layerwise - outputs.aux_loss)
        return (loss, outputs) if return_outputs else loss


def train(text: str, openings: list[str], tokenizer: sentencepiece.SentencePieceProcessor, s: Settings, work: Path):
    """The trained model, float32."""
    config = GrokConfig.from_pretrained(PRESET, initializer_range=s.initializer_range)
    config.output_router_logits, config.router_aux_loss_coef = True, s.router_aux_loss_coef
    set_seed(s.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=s.steps,
        per_device_train_batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        warmup_steps=s.warmup_steps,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=s.weight_decay,
        adam_beta2=s.adam_beta2,
        max_grad_norm=s.max_grad_norm,
        seed=s.seed,
        data_seed=s.seed,
        logging_steps=50,
        logging_first_step=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    LayerwiseBalanceTrainer(model=model, args=arguments, train_dataset=Windows(tokenizer, text, openings, s)).train()
    model.config.output_router_logits = False
    return model.eval()
