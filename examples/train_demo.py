"""Train the demonstration checkpoint of the package, with this package's model and transformers.Trainer.

    python examples/train_demo.py --text tinyshakespeare.txt --out out/demo

The text is the usual 1.1 MB of Shakespeare (any plain text that contains the passages will do). OUT/demo receives the
files of grok1/demo: ckpt-0/ in xAI's on-disk format, config.json, tokenizer.model, passages.json and
training.json; OUT/hf keeps the float32 model as trained. The checkpoint is converted back, and the run fails unless it
recites every passage in float32, bfloat16 and int8 and uses all of its experts. About twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import sentencepiece
import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from grok1.conversion.convert import convert
from grok1.conversion.export_xai import export_xai
from grok1.conversion.tokenizer import convert_tokenizer
from modeling_grok1 import Grok1ForCausalLM, GrokConfig


DEMO = Path(__file__).resolve().parent.parent / "grok1" / "demo"
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
    """The settings that determine the result, together with the text, the passages and configuration/demo.json."""

    seed: int = 0
    steps: int = 1600
    batch_size: int = 8  # windows per step
    window: int = 256  # tokens
    passage_share: float = 0.2  # fraction of windows that begin at a passage
    learning_rate: float = 1.5e-3  # peak, after the warm-up; cosine decay to a tenth of it
    warmup_steps: int = 100
    weight_decay: float = 0.01
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    router_aux_loss_coef: float = 0.1
    # 1/sqrt(D): embeddings times sqrt(D) have unit variance, like the normalised output of every block, and the
    # initial loss is ln V.
    initializer_range: float = 256**-0.5
    scale_blocks: int = 2  # of 128 input rows: groups of 32, 64 and 128 fit into one
    threads: int = 1  # more threads change the order of summation


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
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        unk_surface="[UNK]",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Windows(Dataset):
    """Windows of W token ids at random positions of the text, mixed with windows that begin at a passage."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, text: str, passages: list[str], s: Settings):
        self.window = s.window
        self.text = torch.tensor(tokenizer.encode(text))
        begins = [text.index(passage) for passage in passages]
        # Encoded separately, as a prompt is: with the dummy prefix.
        self.passages = [torch.tensor(tokenizer.encode(text[i : i + 8 * s.window]))[: s.window] for i in begins]
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
    """Load-balancing loss per layer. The model's own loss pools the layers, as Mixtral's does, and does not see an
    expert that is idle in one layer only."""

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


def train(text: str, passages: list[str], tokenizer: sentencepiece.SentencePieceProcessor, s: Settings, work: Path):
    """The trained model, float32."""
    config = GrokConfig.from_pretrained(PRESET, initializer_range=s.initializer_range)
    config.output_router_logits, config.router_aux_loss_coef = True, s.router_aux_loss_coef
    set_seed(s.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
    LayerwiseBalanceTrainer(model=model, args=arguments, train_dataset=Windows(tokenizer, text, passages, s)).train()
    # Used in training only.
    model.config.output_router_logits, model.config.use_cache = False, True
    model.config.router_aux_loss_coef = GrokConfig.router_aux_loss_coef
    return model.eval()


def export(model: Grok1ForCausalLM, tokenizer_model: bytes, out: Path, s: Settings) -> Path:
    """Write the float32 model to OUT/hf and the demonstration checkpoint, int8 with scales, to OUT/demo."""
    hub, demo = out / "hf", out / "demo"
    model.save_pretrained(hub)
    (hub / "tokenizer.model").write_bytes(tokenizer_model)
    convert_tokenizer(hub / "tokenizer.model", hub, model.config.vocab_size)
    export_xai(hub, demo, scale_blocks=s.scale_blocks)
    return demo


def recited_words(model: Grok1ForCausalLM, tokenizer, passage: dict[str, str]) -> int:
    """The number of words of the continuation that greedy decoding reproduces before the first difference."""
    prompt = tokenizer(passage["opening"], return_tensors="pt")
    with_continuation = tokenizer(passage["opening"] + passage["continuation"])["input_ids"]
    length = len(with_continuation) - prompt["input_ids"].shape[1] + 1  # one more: the last word must end
    output = model.generate(**prompt, max_new_tokens=length, do_sample=False, eos_token_id=None)[0]
    expected = passage["continuation"].split()
    found = tokenizer.decode(output)[len(passage["opening"]) :].split()[: len(expected)]
    both = zip_longest(found, expected)
    return next((i for i, (a, b) in enumerate(both) if a != b), len(expected))


@torch.no_grad()
def perplexity_and_usage(model: Grok1ForCausalLM, ids: torch.Tensor, s: Settings) -> tuple[float, float]:
    """On 64 windows spread over the text: perplexity, and the smallest expert load of any layer (1/8: uniform)."""
    starts = torch.linspace(0, len(ids) - s.window - 1, 64).long().tolist()
    losses, visits = [], torch.zeros(1)
    for start in starts:
        window = ids[None, start : start + s.window]
        outputs = model(input_ids=window, labels=window, output_router_logits=True)
        losses.append(outputs.loss.item() - model.config.router_aux_loss_coef * outputs.aux_loss.item())
        chosen = torch.stack(outputs.router_logits).topk(model.config.num_experts_per_tok).indices  # L N k
        visits = visits + torch.nn.functional.one_hot(chosen, model.config.num_experts).sum((1, 2))  # L E
    shares = visits / visits.sum(-1, keepdim=True)
    return math.exp(sum(losses) / len(losses)), shares.min().item()


def check(demo: Path, passages: list[dict[str, str]], text: str, s: Settings) -> dict[str, dict[str, object]]:
    """Measurements of the converted checkpoint by precision. Raises RuntimeError if one fails."""
    results: dict[str, dict[str, object]] = {}
    for dtype in ("float32", "bfloat16", "int8"):
        folder = demo.parent / f"converted-{dtype}"
        convert(demo, folder, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        words = [recited_words(model, tokenizer, passage) for passage in passages]
        perplexity, usage = perplexity_and_usage(model, torch.tensor(tokenizer(text)["input_ids"]), s)
        results[dtype] = {
            "recited_words": words,
            "held_in_perplexity": round(perplexity, 3),
            "least_used_expert": round(usage, 4),
        }
        print(dtype, results[dtype])
        shutil.rmtree(folder)
        whole = [len(passage["continuation"].split()) for passage in passages]
        if words != whole:
            raise RuntimeError(f"{dtype}: recites {words} of {whole} words of the passages; train longer.")
        if usage < 0.03:
            raise RuntimeError(
                f"{dtype}: an expert sees {usage:.1%} of the tokens of a layer; raise the balance loss."
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="plain text that contains the passages")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")

    settings = Settings()
    torch.set_num_threads(settings.threads)
    text = arguments.text.read_text(encoding="utf-8")
    passages = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
    absent = [passage["opening"] for passage in passages if passage["opening"] + passage["continuation"] not in text]
    if absent:
        parser.error(f"{arguments.text} lacks the passages that begin: {absent}")

    tokenizer_model = train_tokenizer(text, GrokConfig.from_pretrained(PRESET).vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    wholes = [passage["opening"] + passage["continuation"] for passage in passages]
    model = train(text, wholes, tokenizer, settings, arguments.out)
    demo = export(model, tokenizer_model, arguments.out, settings)
    results = check(demo, passages, text, settings)

    shutil.copyfile(DEMO / "passages.json", demo / "passages.json")
    record = {
        "settings": asdict(settings),
        "tokens_seen": settings.steps * settings.batch_size * settings.window,
        "text": {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "parameters": model.num_parameters(),
        "after_conversion": results,
    }
    (demo / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{demo}: to ship it, put it in the place of {DEMO}")


if __name__ == "__main__":
    main()
