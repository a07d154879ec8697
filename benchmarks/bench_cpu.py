"""Decoding, prompts and training on this processor and as on one that stops at AVX2, beside llama.cpp: `make bench`.

    python benchmarks/bench_cpu.py [--levels native avx2] [--precisions bf16 int8 int4] [--threads 1 2]
                                   [--rounds N] [--out FILE]

A Grok-1 of 6 layers (hidden 1,024, 8 experts of 4,096, random weights): a token reads about 350 MB of bfloat16, which
no cache holds. The level `avx2` sets `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2`, which limit torch,
oneDNN and Inductor, gives Inductor a cache of its own, because its entries do not tell the two levels apart, and runs
the llama.cpp that `tests/interop/environment.py avx2` built.

Each model lies in a process of its own, idle between questions. In each round both contestants run once, one after the
other, in every second round in the other order; a ratio is taken inside a round. Each row is printed, and written to
FILE, when it is finished. Rows with llama.cpp are left out where its environment is not built.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_speed
import torch
import transformers
from bench_speed import Racer, active_bytes, decode, decode_compiled, machine, read_bandwidth, tokens
from bench_training import SHORT
from transformers import AutoModelForCausalLM

import grok1
from modeling_grok1 import Grok1Int4Config, Grok1Int8Config, GrokConfig
from modeling_grok1.cpu_grok1 import level


SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "num_experts_per_tok": 2,
}
ROOT = Path(__file__).resolve().parents[1]
CONTEXT, STEPS = 2048, 16
LLAMA = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
# precision and work -> the largest ratio to llama.cpp's time that is aimed at
TARGETS = {
    ("bf16", "plain"): 1.3,
    ("bf16", "compiled"): 1.0,
    ("int8", "plain"): 2.0,
    ("int4", "plain"): 2.0,
    **{(precision, f"prompt {length}"): 1.0 for precision in LLAMA for length in (256, 1024)},
}
READING = 1.25  # and of the compiled step, in int8 and int4, to reading its bytes
VARIABLES = {"native": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
QUANTISE = """
import ctypes, sys, llama_cpp
options = llama_cpp.llama_model_quantize_default_params()
options.ftype = 2  # Q4_0
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options)))
"""


# --------------------------------------------------------------------------------------------------------------------
# The process of one model
# --------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def prompt(model: Any, length: int, seed: int) -> float:
    ids = tokens(length, seed)
    begin = bench_speed.CLOCK()
    model(ids, use_cache=True, logits_to_keep=1)
    return bench_speed.CLOCK() - begin


def train(models: dict[str, Any], dtype: str, seed: int) -> float:
    """A forward and a backward pass of 2 sequences of 256 tokens."""
    ids = torch.randint(3, 8192, (2, 256), generator=torch.Generator().manual_seed(seed))
    models[dtype].zero_grad(set_to_none=True)
    begin = bench_speed.CLOCK()
    models[dtype](input_ids=ids, labels=ids).loss.backward()
    return bench_speed.CLOCK() - begin


def works(folder: Path) -> dict[str, Callable[[int], float]]:
    """What the process answers: a name to the seconds with a seed."""
    if folder.name == "training":
        models = {}
        for dtype in ("bf16", "float32"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(GrokConfig(**SHORT)).train()
            models[dtype] = model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        return {dtype: functools.partial(train, models, dtype) for dtype in models}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    step = torch.compile(model.forward, dynamic=False, fullgraph=True)
    return {
        "plain": functools.partial(decode, model, steps=STEPS),
        "compiled": functools.partial(decode_compiled, model, step, steps=STEPS),
        "prompt 256": functools.partial(prompt, model, 256),
        "prompt 1024": functools.partial(prompt, model, 1024),
        "reading": lambda seed: active_bytes(folder, SIZES) / read_bandwidth(),
    }


def answer(folder: Path) -> None:
    runs = works(folder)
    print(json.dumps({"level": str(level())}), flush=True)
    for line in sys.stdin:
        name, _, seed = line.strip().rpartition(" ")
        print(runs[name](int(seed)), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------
def llama_python(name: str) -> Path | None:
    """The environment with llama.cpp of a level; None where it is not built."""
    folder = ROOT / ".cache" / ("interop" if name == "native" else f"interop-{name}") / "venv"
    built = list(folder.glob("lib/python*/site-packages/llama_cpp_python-*.dist-info/RECORD"))
    return folder / "bin" / "python" if built else None


def build(folder: Path, precisions: list[str]) -> None:
    """The folders bf16, int8 and int4, and with llama.cpp bf16.gguf, q8_0.gguf and q4_0.gguf."""
    torch.manual_seed(0)
    config = GrokConfig(**SIZES, num_experts=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "bf16")
    quantised = {"int8": Grok1Int8Config(scale_blocks=8), "int4": Grok1Int4Config(group_size=32)}
    for name in precisions:
        if name in quantised:
            model = AutoModelForCausalLM.from_pretrained(
                folder / "bf16", dtype=torch.bfloat16, quantization_config=quantised[name]
            )
            model.save_pretrained(folder / name)
    python = llama_python("native") or llama_python("avx2")
    if python is None:
        return
    converter = next((ROOT / ".cache" / "interop").glob("llama.cpp-*/convert_hf_to_gguf.py"))
    demo = Path(grok1.__file__).parent / "demo" / "tokenizer.model"
    (folder / "bf16" / "tokenizer.model").write_bytes(demo.read_bytes())
    for kind in ("bf16", "q8_0"):
        words = [python, converter, folder / "bf16", "--outtype", kind, "--outfile", folder / f"{kind}.gguf"]
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
    words = [python, "-c", QUANTISE, folder / "bf16.gguf", folder / "q4_0.gguf"]
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


# --------------------------------------------------------------------------------------------------------------------
# Races
# --------------------------------------------------------------------------------------------------------------------
def race(ours: Callable[[int], float], other: Callable[[int], float], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, a number a round, after one round that does not count."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, rounds):
        pair = ((0, ours), (1, other))
        for i, ask in pair if number % 2 == 0 else pair[::-1]:
            seconds = ask(number + 2)
            if number >= 0:
                found[i].append(seconds)
    return found


def row(label: str, other_label: str, found: tuple[list[float], list[float]], target: float | None) -> str:
    ratios = [a / b for a, b in zip(*found, strict=True)]
    middle = statistics.median(ratios)
    ours, other = (f"{1000 * statistics.median(seconds):.1f}" for seconds in found)
    aim = ("", "") if target is None else (f"at most {target:g}", "yes" if middle <= target else "no")
    cells = (label, ours, other_label, other, f"{middle:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", *aim)
    return f"| {' | '.join(cells)} |"


def start(name: str, folder: Path, threads: int, cpu_time: bool) -> tuple[Racer, Callable[[str, int], float]]:
    """Our process for a folder at a level, and what asks it."""
    variables = VARIABLES[name] | {"OMP_NUM_THREADS": str(threads)}
    if name != "native":
        variables["TORCHINDUCTOR_CACHE_DIR"] = str(ROOT / ".cache" / f"inductor-{name}")
    words = ["env", *(f"{key}={value}" for key, value in variables.items()), sys.executable, __file__]
    racer = Racer(*words, "--racer", folder, "--threads", threads, *["--cpu-time"] * cpu_time)
    assert racer.process.stdout
    print(name, threads, folder.name, json.loads(racer.process.stdout.readline())["level"], file=sys.stderr)
    return racer, lambda work, seed: racer.ask(f"{work} {seed}")


def rows_of(name: str, precision: str, folder: Path, threads: int, rounds: int, cpu_time: bool):
    """The rows of a precision at a level."""
    racer, ask = start(name, folder / precision, threads, cpu_time)
    python, llama = llama_python(name), None
    if python is not None:
        worker = Path(__file__).with_name("bench_llama.py")
        llama = Racer(
            python, worker, folder / f"{LLAMA[precision]}.gguf", threads, CONTEXT, "cpu" if cpu_time else "clock"
        )
    questions = dict.fromkeys(("plain", "compiled"), "decode 16 16")
    questions |= {f"prompt {length}": f"prefill {length} 1" for length in (256, 1024)}
    for work, question in questions.items():
        label = f"{precision}, {threads} threads, {work}"
        if llama is not None:
            other = functools.partial(lambda llama, question, seed: llama.ask(question), llama, question)
            found = race(functools.partial(ask, work), other, rounds)
            yield row(label, f"llama.cpp {LLAMA[precision]}", found, TARGETS.get((precision, work)))
        elif work.startswith("prompt"):
            found = race(functools.partial(ask, work), functools.partial(ask, "reading"), rounds)
            yield row(label, "reading the weights of a token", found, None)
        if not work.startswith("prompt"):
            found = race(functools.partial(ask, work), functools.partial(ask, "reading"), rounds)
            target = READING if work == "compiled" and precision != "bf16" else None
            yield row(label, "reading its weights", found, target)
    for process in (racer, llama):
        if process is not None:
            process.close()


def rows_of_training(name: str, folder: Path, threads: int, rounds: int, cpu_time: bool):
    racer, ask = start(name, folder / "training", threads, cpu_time)
    found = race(functools.partial(ask, "bf16"), functools.partial(ask, "float32"), rounds)
    yield row(f"training step in bf16, {threads} threads", "in float32", found, 1.0)
    racer.close()


class Section:
    """The table of a level, in its place of the file, written again with every row."""

    head = (
        "| ours | ms | beside | ms | ratio | range | target | met |",
        "|---|--:|---|--:|--:|--:|---|---|",
    )

    def __init__(self, name: str, title: str, out: Path | None):
        self.name, self.title, self.out, self.rows = name, title, out, list[str]()
        print(title, *self.head, sep="\n", flush=True)

    def add(self, line: str, last: bool = False) -> None:
        if line:
            self.rows.append(line)
            print(line, flush=True)
        if self.out is None:
            return
        begin, end = f"<!-- {self.name} -->", f"<!-- end of {self.name} -->"
        note = [] if last else ["", "Incomplete: the run was interrupted or goes on."]
        text = "\n".join([begin, "", self.title, "", *self.head, *self.rows, *note, "", end])
        before = self.out.read_text() if self.out.exists() else "# Speed on a CPU, measured\n"
        if begin in before and end in before:
            kept, rest = before.partition(begin)[0], before.partition(end)[2]
        else:
            kept, rest = before.rstrip("\n") + "\n\n", "\n"
        self.out.write_text(kept + text + rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=list(VARIABLES), default=list(VARIABLES))
    parser.add_argument("--precisions", nargs="+", choices=list(LLAMA), default=list(LLAMA))
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, 2, cores} & set(range(1, cores + 1)))[::-1]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="the file that keeps a table for each level")
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of CPU time instead of the clock; with one thread only"
    )
    parser.add_argument("--racer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cpu_time:
        arguments.threads = [1]
        bench_speed.CLOCK = time.process_time
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if arguments.racer:
        torch.set_num_threads(arguments.threads[0])
        answer(arguments.racer)
        return
    levels = arguments.levels
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        levels = ["native"]  # the two are one
    with tempfile.TemporaryDirectory(prefix="bench-cpu-") as temporary:
        folder = Path(temporary)
        build(folder, arguments.precisions)
        for name in levels:
            limits = " ".join(f"{key}={value}" for key, value in VARIABLES[name].items()) or "no limits"
            title = f"Level `{name}` ({limits}): {machine(arguments.threads[0])}; {arguments.rounds} rounds"
            title += ", seconds of CPU time." if arguments.cpu_time else "."
            section = Section(name, title, arguments.out)
            for threads in arguments.threads:
                for precision in arguments.precisions:
                    for line in rows_of(name, precision, folder, threads, arguments.rounds, arguments.cpu_time):
                        section.add(line)
                for line in rows_of_training(name, folder, threads, arguments.rounds, arguments.cpu_time):
                    section.add(line)
            section.add("", last=True)


if __name__ == "__main__":
    main()
