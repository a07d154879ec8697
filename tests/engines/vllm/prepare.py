"""Write what the tests in this folder compare vLLM with: folders to serve, and what Transformers computes with them.

    .venv/bin/python tests/engines/vllm/prepare.py .cache/vllm-data

It runs in the main environment, for the model's own code needs a newer Transformers than vLLM brings.
"""

import copy
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from grok1.conversion.convert import convert
from modeling_grok1 import Grok1ForCausalLM, Grok1Int4Config, Grok1Int8Config, GrokConfig


ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "grok1" / "demo"
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
PASSAGES = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))


@torch.no_grad()
def log_probs(model: torch.nn.Module, rows: list[list[int]]) -> np.ndarray:
    """Of every token at every position, of all rows one after the other, computed in float64: (sum of lengths, V)."""
    model = copy.deepcopy(model).double()
    return torch.cat([model(torch.tensor([row])).logits[0].double().log_softmax(-1) for row in rows]).numpy()


def golden_rows(name: str) -> list[list[int]]:
    """The three rows of a golden checkpoint without the padding on their right."""
    (file,) = (GOLDEN / name).glob("ref_fp32_*.npz")
    return [[int(token) for token in row if token != 0] for row in np.load(file)["tokens"]]


def wide_model() -> Grok1ForCausalLM:
    """Random weights with heads of 128, as the release has them, and a number of heads that two ranks can share."""
    config = GrokConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        embedding_multiplier_scale=16.0,
        initializer_range=0.06,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    return Grok1ForCausalLM(config).eval()


def answers(model: Grok1ForCausalLM, tokenizer) -> list[dict]:
    """32 prompts of different lengths out of the passages, with the 24 tokens that greedy decoding adds."""
    model.generation_config.eos_token_id = None
    found = []
    for passage in PASSAGES:
        ids = tokenizer.encode(passage["opening"] + passage["continuation"])
        for start, length in ((0, 9), (0, 40), (3, 21), (10, 55)):
            prompt = torch.tensor([ids[start : start + length]])
            output = model.generate(prompt, max_new_tokens=24, do_sample=False)
            found.append({"prompt": prompt[0].tolist(), "answer": output[0, prompt.shape[1] :].tolist()})
    return found


def quantise(folder: Path, out: Path) -> None:
    """Write the folder's model in W8A16 and W4A16, in groups of 128 and 32."""
    for group in (128, 32):
        methods = {8: Grok1Int8Config(scale_blocks=1, group_size=group), 4: Grok1Int4Config(group_size=group)}
        for bits, method in methods.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=method)
            model.save_pretrained(out / f"wide-w{bits}a16-{group}")


def evaluation(model: Grok1ForCausalLM, tokenizer, out: Path) -> dict[str, float]:
    """Write the documents of the tasks in tasks.py, and compute lm-evaluation-harness's scores by their definitions.

    The choices continue six characters from the middle of a passage, too few for the right answer everywhere.
    """
    texts = [passage["opening"] + passage["continuation"] for passage in PASSAGES]
    right, bits, size, words = [], 0.0, 0, 0
    choices = []
    for label in range(4):
        for start in (12, 40, 68, 96):
            context = texts[label][start : start + 6].rstrip()
            options = [text[start + len(context) : start + 30] for text in texts[:4]]
            choices.append({"context": context, "choices": options, "label": label})
            # The harness puts the tokens of the context before the tokens of the whole text that come after as many.
            prefix = tokenizer.encode(context)
            ids = [prefix + tokenizer.encode(context + option)[len(prefix) :] for option in options]
            found = [log_probs(model, [row])[range(len(row) - 1), row[1:]][len(prefix) - 1 :].sum() for row in ids]
            right.append(int(np.argmax(found)) == label)
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        bits -= log_probs(model, [ids])[range(len(ids) - 1), ids[1:]].sum() / math.log(2)
        size += len(text.encode())
        words += len(re.split(r"\s+", text))
    passages = [{**passage, "text": text} for passage, text in zip(PASSAGES, texts, strict=True)]
    for name, documents in (("choices", choices), ("passages", passages)):
        lines = [json.dumps(document) for document in documents]
        (out / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"acc": np.mean(right), "bits_per_byte": bits / size, "word_perplexity": 2 ** (bits / words)}


def adapter(folder: Path, out: Path, tokenizer) -> dict:
    """Train a LoRA adapter of the attention with PEFT, on a sentence that the demo does not know."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    ids = torch.tensor(
        [tokenizer.encode("Now is the winter of our paged attention, and of the blocks that it holds.")]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(out)
    return {"prompt": ids[0].tolist(), "log_probs": log_probs(model, ids.tolist()).tolist()}


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(1)
    references = {}
    for name in ("tiny-1", "tiny-8"):
        for dtype in ("float32", "bfloat16"):
            convert(GOLDEN / name, out / f"{name}-{dtype}", dtype=dtype, no_tokenizer=True)
        model = AutoModelForCausalLM.from_pretrained(out / f"{name}-float32", dtype=torch.float32)
        references[name] = log_probs(model, golden_rows(name))
    for dtype in ("float32", "bfloat16"):
        convert(DEMO, out / f"demo-{dtype}", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(out / "demo-float32", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "demo-float32")
    texts = [tokenizer.encode(passage["opening"] + passage["continuation"]) for passage in PASSAGES]
    references["demo"] = log_probs(model, texts)
    known = {
        "passages": [{**passage, "ids": ids} for passage, ids in zip(PASSAGES, texts, strict=True)],
        "answers": answers(model, tokenizer),
        "scores": evaluation(model, tokenizer, out),
        "adapter": adapter(out / "demo-float32", out / "adapter", tokenizer),
    }
    wide = wide_model()
    wide.save_pretrained(out / "wide-float32")
    quantise(out / "wide-float32", out)
    known["wide"] = torch.randint(3, 512, (2, 100), generator=torch.Generator().manual_seed(1)).tolist()
    references["wide"] = log_probs(wide, known["wide"])
    np.savez(out / "references.npz", **references)
    (out / "known.json").write_text(json.dumps(known), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
