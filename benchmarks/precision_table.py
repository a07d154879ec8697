"""Memory and quality of each precision, measured on the demonstration checkpoint.

    python benchmarks/precision_table.py [--text FILE]

Converts the bundled checkpoint, runs it in every precision on the CPU, and prints a Markdown table: bytes of weights
with all quantisation state, perplexity of FILE (default: the passages of the training set) over windows of 512 tokens
that do not overlap, top-1 agreement with the bfloat16 model, passages reproduced word for word, and tokens/s while
generating them (batch 1). Exits with 1 where int8 computed in float32 does not give the perplexity of the float32
conversion to the printed digits.
"""

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import grok1
from grok1.analysis.evaluate import score, stored_bytes, windows
from grok1.conversion.convert import convert
from grok1.loading import load_model
from grok1.precision import PRECISIONS
from modeling_grok1 import Grok1Int4Config


DEMO = Path(grok1.__file__).parent / "demo"
CONTEXT = 512

INT8_FLOAT32 = "int8, xAI's values, in float32"
# Title: the `--dtype` of the conversion, and the precision to load in: every precision, and int8 computed in float32.
ROWS = {
    **{row.title: (row.converted, row.name) for row in PRECISIONS.values()},
    INT8_FLOAT32: ("int8", "float32"),
}
# int4 of every group size, with scales that are searched for and with rounding to nearest, from the int8 folder.
INT4_ROWS = {
    f"int4, groups of {group_size}, {'scale search' if search else 'round to nearest'}": (group_size, search)
    for group_size in (128, 64, 32)
    for search in (False, True)
}


def recite(model, tokenizer, passages: list[dict[str, str]]) -> tuple[int, float]:
    """How many passages greedy decoding reproduces word for word after their opening, and tokens/s."""
    whole, tokens, seconds = 0, 0, 0.0
    for passage in passages:
        prompt = tokenizer(passage["opening"], return_tensors="pt")["input_ids"]
        length = len(tokenizer(passage["opening"] + passage["continuation"])["input_ids"]) - prompt.shape[1] + 1
        start = time.perf_counter()
        output = model.generate(prompt, max_new_tokens=length, do_sample=False, eos_token_id=None)[0]
        seconds += time.perf_counter() - start
        tokens += length
        expected = passage["continuation"].split()
        whole += tokenizer.decode(output)[len(passage["opening"]) :].split()[: len(expected)] == expected
    return whole, tokens / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="UTF-8 text to predict; by default the passages of the demo")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    passages = json.loads((DEMO / "passages.json").read_text(encoding="utf-8"))
    text = "\n".join(passage["opening"] + passage["continuation"] for passage in passages)
    if arguments.text is not None:
        text = arguments.text.read_text(encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        folders = {dtype: Path(scratch, dtype) for dtype in ("float32", "bfloat16", "int8", "int4")}
        for dtype, folder in folders.items():
            convert(DEMO, folder, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folders["bfloat16"])
        pieces = windows(torch.tensor(tokenizer(text)["input_ids"]), CONTEXT)
        _, expected = score(load_model(folders["bfloat16"], "bfloat16"), pieces)
        print(
            f"{sum(map(len, pieces)):,} tokens in {len(pieces)} windows, {torch.get_num_threads()} thread(s) of "
            f"{platform.processor() or platform.machine()}, torch {torch.__version__}\n"
        )
        print("| precision | weights, MB | perplexity | agreement with bfloat16 | passages recited | tokens/s |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        perplexity = {}
        for label in [*ROWS, *INT4_ROWS]:
            if label in ROWS:
                converted, precision = ROWS[label]
                model = load_model(folders[converted], precision)
            else:
                group_size, search = INT4_ROWS[label]
                config = Grok1Int4Config(group_size=group_size, scale_search=search)
                model = AutoModelForCausalLM.from_pretrained(folders["int8"], quantization_config=config)
            size = stored_bytes(model)
            nats, likeliest = score(model, pieces)
            perplexity[label] = f"{math.exp(nats / len(likeliest)):.4f}"
            agreement = (likeliest == expected).double().mean().item()
            whole, speed = recite(model, tokenizer, passages)
            print(
                f"| {label} | {size / 1e6:.2f} | {perplexity[label]} | {agreement:.2%} | {whole} of {len(passages)} "
                f"| {speed:.0f} |",
                flush=True,
            )
    if perplexity[INT8_FLOAT32] != perplexity["float32"]:
        print("xAI's int8 in float32 and the float32 conversion differ.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
