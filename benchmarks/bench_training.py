"""Training steps beside Mixtral's, on the CPU: `make bench`.

    python benchmarks/bench_training.py [--rounds N] [--threads N] [--out FILE]

Small models with random weights, of the same sizes, each in a process of its own. In each round both take one step,
one directly after the other; ratios are taken within a round, and their median and range are printed. Time is the
process's CPU time, which other processes disturb less than wall-clock time; memory is the peak of resident memory in a
step minus what was resident before it.
"""

import argparse
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from modeling_grok1 import Grok1ForCausalLM, Grok1Int8Config, GrokConfig


SHORT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
LONG = {**SHORT, "hidden_size": 768, "num_hidden_layers": 4, "num_attention_heads": 12, "num_key_value_heads": 4}
ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
LINEAR_EXPERTS = {"target_modules": ["w1", "w2", "w3"]}
FUSED_EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
# name -> sizes, batch and tokens, what LoRA adapts in Grok-1 and in Mixtral, how Grok-1 is loaded
CASES: dict[str, tuple[dict[str, int], tuple[int, int], tuple[dict, dict] | None, dict[str, Any]]] = {
    "full": (SHORT, (2, 256), None, {}),
    "LoRA on attention": (SHORT, (2, 256), (ATTENTION, ATTENTION), {}),
    "LoRA on linear experts": (SHORT, (2, 256), (LINEAR_EXPERTS, FUSED_EXPERTS), {"experts_layout": "linear"}),
    "LoRA on int8": (
        SHORT,
        (2, 256),
        (LINEAR_EXPERTS, FUSED_EXPERTS),
        {"experts_layout": "linear", "quantization_config": Grok1Int8Config()},
    ),
    "full, long": (LONG, (1, 2048), None, {}),
}


def build(kind: str, case: str) -> Any:
    sizes, _, lora, load = CASES[case]
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=8, sliding_window=None, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    else:
        model = Grok1ForCausalLM(GrokConfig(**sizes))
        if load:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **load)
    if lora is not None:
        from peft import LoraConfig, get_peft_model

        targets = lora[kind == "mixtral"]
        model = get_peft_model(model, LoraConfig(r=16, task_type="CAUSAL_LM", **targets))
    model.config.use_cache = False
    return model.train()


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step(model: Any, case: str, seed: int) -> tuple[float, int]:
    """CPU seconds and peak bytes of a forward and a backward pass."""
    batch, length = CASES[case][1]
    ids = torch.randint(3, 8192, (batch, length), generator=torch.Generator().manual_seed(seed))
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = memory("VmRSS"), time.process_time()
    model(input_ids=ids, labels=ids).loss.backward()
    return time.process_time() - start, memory("VmHWM") - before


def answer(kind: str, case: str) -> None:
    """A process: builds a model and answers each seed with the figures of a step."""
    model = build(kind, case)
    print("ready", flush=True)
    for line in sys.stdin:
        print(*step(model, case, int(line)), flush=True)


def contestant(kind: str, case: str) -> Callable[[int], tuple[float, float]]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--answer", kind, case], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    questions, answers = process.stdin, process.stdout
    assert answers.readline() == "ready\n"

    def ask(seed: int) -> tuple[float, float]:
        questions.write(f"{seed}\n")
        questions.flush()
        seconds, peak = answers.readline().split()
        return float(seconds), float(peak)

    return ask


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def race(case: str, rounds: int) -> str:
    """A row of the table."""
    ask = {kind: contestant(kind, case) for kind in ("grok1", "mixtral")}
    for kind in ask:
        ask[kind](0)  # first calls allocate
    pairs = []
    for seed in range(1, rounds + 1):
        order = list(ask) if seed % 2 else list(ask)[::-1]
        found = {kind: ask[kind](seed) for kind in order}
        pairs.append((found["grok1"], found["mixtral"]))
    seconds = spread([ours[0] / theirs[0] for ours, theirs in pairs])
    peaks = spread([ours[1] / theirs[1] for ours, theirs in pairs])
    own, other = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    ours, theirs = (statistics.median(pair[i][1] for pair in pairs) / 1e6 for i in (0, 1))
    return f"| {case} | {own:.2f} | {other:.2f} | {seconds} | {ours:.0f} | {theirs:.0f} | {peaks} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path, help="append the table to this file too")
    parser.add_argument("--answer", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(*arguments.answer)
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    rows = [
        "| training step | CPU s | Mixtral | ratio | peak MB | Mixtral | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    print(*rows, sep="\n", flush=True)
    for case in arguments.cases:
        rows.append(race(case, arguments.rounds))
        print(rows[-1], flush=True)
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write("\n" + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
