"""Decode, prefill, loading and import time, compared with the machine's limits and other engines: `make bench`.

    python benchmarks/bench_speed.py [--rounds N] [--threads N] [--llama PYTHON CONVERTER] [--out FILE]

A Grok-1 of about 1.1 billion parameters with random weights, on the CPU, is compared with models of the same sizes:
Transformers' Mixtral (each experts implementation, plain and compiled), llama.cpp on the same weights, and the method
of xAI's JAX code (dequantise, run all experts on every token, combine by one-hot), reimplemented here. Each has a
process of its own, idle between requests. In each round every candidate runs once, in reverse order in every second
round; ratios are taken within a round, and their median and range over the rounds are printed. Run it on an idle
machine with 16 GB of memory and 8 GB of disk.
"""

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, StaticCache

import grok1
from modeling_grok1 import Grok1Int8Config, GrokConfig
from modeling_grok1.cpu_grok1 import fast_decoding
from modeling_grok1.experts_grok1 import geglu
from modeling_grok1.quantized_grok1 import QuantizedExperts, QuantizedLinear, dequantise


SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 5472,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "num_experts_per_tok": 2,
}
PROMPT, STEPS, CONTEXT = 16, 24, 512
PREFILL, PROMPTS = 256, 3
EXPERTS = ("grouped_mm", "eager", "batched_mm")
# With one thread bench_cpu.py may take the CPU time of the process instead, which other processes disturb less.
CLOCK = time.perf_counter


# --------------------------------------------------------------------------------------------------------------------
# Candidates: two functions each, seconds of one decode step and seconds of one prompt
# --------------------------------------------------------------------------------------------------------------------
def tokens(count: int, seed: int) -> torch.Tensor:
    """1 count"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, SIZES["vocab_size"], (1, count), generator=generator)


@torch.inference_mode()
def decode(model: nn.Module, seed: int, steps: int = STEPS) -> float:
    cache = model(tokens(PROMPT, seed), use_cache=True).past_key_values
    seconds = []
    for token in tokens(steps, seed + 1)[0]:
        begin = CLOCK()
        with fast_decoding(model):  # as `generate` does, once for its loop
            model(token.view(1, 1), past_key_values=cache, use_cache=True)
        seconds.append(CLOCK() - begin)
    return statistics.median(seconds)


@torch.inference_mode()
def decode_compiled(model: nn.Module, step: Callable, seed: int, steps: int = STEPS) -> float:
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
    model(tokens(PROMPT, seed), past_key_values=cache, use_cache=True)
    seconds = []
    for i, token in enumerate(tokens(steps, seed + 1)[0]):
        position = torch.tensor([[PROMPT + i]])
        begin = CLOCK()
        with fast_decoding(model):
            step(token.view(1, 1), past_key_values=cache, use_cache=True, position_ids=position)
        seconds.append(CLOCK() - begin)
    return statistics.median(seconds)


@torch.inference_mode()
def prefill(model: nn.Module, seed: int, prompts: int = PROMPTS) -> float:
    seconds = []
    for i in range(prompts):  # the first after other work is slower
        prompt = tokens(PREFILL, prompts * seed + i)
        begin = CLOCK()
        model(prompt, use_cache=True, logits_to_keep=1)
        seconds.append(CLOCK() - begin)
    return statistics.median(seconds)


@contextmanager
def experts_implementation(model: nn.Module, name: str):
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    yield
    model.set_experts_implementation(before)


@contextmanager
def as_jax():
    """xAI's JAX code: whole matrices are dequantised, all experts see every token, a one-hot matrix selects."""

    def linear(self, x):
        return nn.functional.linear(x, dequantise(self.weight, self.weight_scale, x.dtype))

    def experts(self, x, chosen, gates):
        gate_up = dequantise(self.gate_up_proj, self.gate_up_proj_scale, x.dtype)
        down = dequantise(self.down_proj, self.down_proj_scale, x.dtype)
        y = geglu(*(x @ gate_up.transpose(1, 2)).chunk(2, dim=-1)) @ down.transpose(1, 2)  # E N D
        one_hot = nn.functional.one_hot(chosen, self.num_experts).to(x.dtype)  # N k E
        return torch.einsum("end,nke,nk->nd", y, one_hot, gates)

    with mock.patch.multiple(QuantizedLinear, forward=linear), mock.patch.multiple(QuantizedExperts, forward=experts):
        yield


class Racer:
    """A process that answers each line with seconds, idle between questions."""

    def __init__(self, *command):
        words = [str(word) for word in command]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def contestants(kind: str, folder: Path) -> dict[str, Callable[[int], float]]:
    """The candidates of one model: a name and "decode" or "prefill" to the seconds with a seed."""
    if kind == "mixtral":
        torch.manual_seed(0)
        config = MixtralConfig(**SIZES, num_local_experts=8, sliding_window=None, tie_word_embeddings=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    runs: dict[str, Callable[[int], float]] = {}

    def enter(name: str, function: Callable, *extra, context: Callable = nullcontext) -> None:
        def run(seed: int) -> float:
            with context():
                return function(model, *extra, seed)

        runs[name] = run

    def enter_compiled(name: str, context: Callable = nullcontext) -> None:
        step = torch.compile(model.forward, dynamic=False, fullgraph=True)
        enter(f"{name} compiled decode", decode_compiled, step, context=context)

    if kind == "mixtral":
        for name in EXPERTS:
            implementation = functools.partial(experts_implementation, model, name)
            enter(f"mixtral {name} decode", decode, context=implementation)
            if name != "batched_mm":  # copies the experts of every token: 17 GB here
                enter(f"mixtral {name} prefill", prefill, context=implementation)
            if name != "eager":  # cannot be compiled whole
                enter_compiled(f"mixtral {name}", context=implementation)
    else:
        enter(f"grok {kind} decode", decode)
        enter(f"grok {kind} prefill", prefill)
        enter_compiled(f"grok {kind}")
    if kind == "int8":
        enter("jax way decode", functools.partial(decode, steps=3), context=as_jax)
        enter("jax way prefill", functools.partial(prefill, prompts=1), context=as_jax)
    return runs


def answer(kind: str, folder: Path) -> None:
    """The process of one model: prints the names of its candidates, then answers lines `NAME SEED`."""
    runs = contestants(kind, folder)
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        name, _, seed = line.strip().rpartition(" ")
        print(runs[name](int(seed)), flush=True)


# --------------------------------------------------------------------------------------------------------------------
# Limits of the machine, and the work of one token
# --------------------------------------------------------------------------------------------------------------------
def read_bandwidth() -> float:
    """Bytes per second when summing 1 GiB."""
    memory = torch.ones(2**27, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        begin = CLOCK()
        memory.sum()
        seconds.append(CLOCK() - begin)
    return memory.nbytes / min(seconds)


def matrix_rate() -> float:
    """bfloat16 FLOP/s of the model's own largest product with 2048 rows."""
    D, F = SIZES["hidden_size"], 2 * SIZES["intermediate_size"]  # noqa: N806
    x, weight = torch.randn(2048, D).bfloat16(), torch.randn(F, D).bfloat16()
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048 * D * F / min(seconds)


def active_bytes(folder: Path, sizes: dict[str, int] = SIZES) -> int:
    """Bytes of the weights that one token reads. The embedding is read as the head."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in set(shard.keys()) - {"lm_head.weight"}:
                share = sizes["num_experts_per_tok"] / 8 if ".experts." in name else 1
                total += int(shard.get_tensor(name).nbytes * share)
    return total


def active_flop() -> float:
    """Of one token's products, without attention scores and head."""
    D, F, L = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_hidden_layers"]  # noqa: N806
    width = SIZES["head_dim"] * (2 * SIZES["num_attention_heads"] + 2 * SIZES["num_key_value_heads"])
    return 2 * L * (D * width + SIZES["num_experts_per_tok"] * 3 * D * F)


# --------------------------------------------------------------------------------------------------------------------
# Loading and importing
# --------------------------------------------------------------------------------------------------------------------
def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


@contextmanager
def peak_memory(result: list[int]):
    """Adds the growth of anonymous memory at its peak, in bytes."""
    base, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    done.set()
    thread.join()
    result.append(max(peak, anonymous_bytes()) - base)


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, copied out of the file."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118
    return tensors


LOADERS: dict[str, Callable] = {
    "from_pretrained": functools.partial(AutoModelForCausalLM.from_pretrained, dtype="auto"),
    "safetensors": read_whole,
}


def load(loader: str, folder: Path, small: Path) -> None:
    """Run in a process of its own, as users load: prints seconds, peak memory and bytes held, as JSON."""
    LOADERS[loader](small)  # imports what it needs
    peaks: list[int] = []
    with peak_memory(peaks):
        begin = time.perf_counter()
        loaded = LOADERS[loader](folder)
        seconds = time.perf_counter() - begin
    weights = sum(weight.nbytes for weight in (loaded.values() if isinstance(loaded, dict) else loaded.parameters()))
    print(json.dumps({"seconds": seconds, "peak": peaks[0], "weights": weights}))


def loading(paths: dict[str, Path], rounds: int) -> dict[str, list[dict]]:
    """What `load` tells, a number a round: by "KIND LOADER"."""

    def run(name: str) -> dict:
        kind, loader = name.split()
        command = [sys.executable, __file__, "--load", loader, str(paths[kind]), str(paths["small"])]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        return json.loads(output.splitlines()[-1])

    results: dict[str, list[dict]] = {}
    for names in (["bf16 from_pretrained", "bf16 safetensors"], ["fused from_pretrained"]):
        for name in names:
            run(name)  # brings the file into the page cache
        for number in range(rounds):
            # What a process is given may be memory that the one before it gave back, which is faster: each is second
            # as often as first.
            for name in names[:: 1 if number % 2 == 0 else -1]:
                results.setdefault(name, []).append(run(name))
    return results


IMPORTS = """
import importlib, sys, time
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except Exception:
        pass
begin = time.perf_counter()
import grok1
print(time.perf_counter() - begin)
"""
NAMES = "import sys, modeling_grok1; print(','.join(n for n in sys.modules if not n.startswith('modeling_grok1')))"


def import_seconds(rounds: int) -> list[float]:
    """What importing the package adds where all that it uses is imported already."""

    def run(*words: str) -> str:
        return subprocess.run([sys.executable, "-c", *words], check=True, capture_output=True, text=True).stdout

    names = run(NAMES).strip()
    return [float(run(IMPORTS, names)) for _ in range(rounds)]


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------
class Table:
    def __init__(self) -> None:
        self.rows: list[tuple[str, ...]] = []

    def add(self, what: str, ratios: list[float], target: float, at_most: bool = False) -> None:
        middle = statistics.median(ratios)
        met = middle <= target if at_most else middle >= target
        bound = f"{'at most' if at_most else 'at least'} {target:g}"
        self.rows.append(
            (what, f"{middle:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", bound, "yes" if met else "no")
        )

    def markdown(self) -> str:
        head = ("ratio", "median", "range", "target", "met")
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---", "--:", "--:", "--:", "---"), *self.rows)]
        return "\n".join(lines)


def divide(numerators: list[float], denominators: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def build(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Writes the models: hub folder, int8, fused, two GGUF files, and a small one of the same kind."""
    torch.manual_seed(0)
    paths = {name: folder / name for name in ("bf16", "int8", "fused", "small")}
    small = {name: min(size, 8) for name, size in SIZES.items()}
    AutoModelForCausalLM.from_config(GrokConfig(**small, num_experts=8)).save_pretrained(paths["small"])
    config = GrokConfig(**SIZES, num_experts=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(paths["bf16"])
    paths["fused"].mkdir()
    fused = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(fused, paths["fused"] / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(paths["fused"])
    del model, fused
    quantised = AutoModelForCausalLM.from_pretrained(
        paths["bf16"], dtype=torch.bfloat16, quantization_config=Grok1Int8Config(scale_blocks=8)
    )
    quantised.save_pretrained(paths["int8"])
    if arguments.llama:
        python, converter = arguments.llama
        demo = Path(grok1.__file__).parent / "demo" / "tokenizer.model"
        (paths["bf16"] / "tokenizer.model").write_bytes(demo.read_bytes())
        for kind, label in (("bf16", "llama.cpp bf16"), ("q8_0", "llama.cpp q8_0")):
            paths[label] = folder / f"{kind}.gguf"
            command = [python, converter, paths["bf16"], "--outtype", kind, "--outfile", paths[label]]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return paths


def race(paths: dict[str, Path], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by contestant, a number a round: "NAME decode" of one step and "NAME prefill" of one prompt."""
    racers, questions = [], {}
    for kind in ("bf16", "int8", "mixtral"):
        racer = Racer(sys.executable, __file__, "--racer", kind, paths.get(kind, "-"), "--threads", arguments.threads)
        racers.append(racer)
        assert racer.process.stdout
        for name in json.loads(racer.process.stdout.readline()):
            questions[name] = functools.partial(lambda racer, name, seed: racer.ask(f"{name} {seed}"), racer, name)
    for label in (label for label in paths if label.startswith("llama")):
        worker = Path(__file__).with_name("bench_llama.py")
        racer = Racer(arguments.llama[0], worker, paths[label], arguments.threads, CONTEXT)
        racers.append(racer)
        for name, question in (("decode", f"decode {PROMPT} {STEPS}"), ("prefill", f"prefill {PREFILL} {PROMPTS}")):
            questions[f"{label} {name}"] = functools.partial(lambda racer, q, seed: racer.ask(q), racer, question)
    questions["bandwidth"] = lambda seed: 1 / read_bandwidth()
    questions["matrix rate"] = lambda seed: 1 / matrix_rate()

    for name, ask in questions.items():
        # oneDNN prepares each product for its number of rows, which an expert gets anew with every prompt: it takes a
        # dozen prompts until most numbers were there.
        for seed in range(1000, 1006 if name.endswith("prefill") else 1001):
            ask(seed)
    # What is compared runs within seconds, for the memory's rate moves with the neighbours of a virtual machine.
    slow = {"mixtral batched_mm decode", "jax way decode", "jax way prefill"}
    order = sorted(questions, key=lambda name: ("prefill" in name or name == "matrix rate", name in slow))
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for number in range(arguments.rounds):
        for name in order[:: 1 if number % 2 == 0 else -1]:
            # A prompt of its own for each: one that another run of the same process had would find its products ready.
            seconds[name].append(questions[name](1 + number * len(order) + order.index(name)))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
        if arguments.out:  # what an interrupted run leaves
            arguments.out.with_suffix(".partial.json").write_text(json.dumps(seconds, indent=1) + "\n")
    for racer in racers:
        racer.close()
    for kind in ("bf16", "int8"):
        active = active_bytes(paths[kind])
        seconds[f"{kind} limit"] = [active * inverse for inverse in seconds["bandwidth"]]
    seconds["prefill limit"] = [PREFILL * active_flop() * inverse for inverse in seconds["matrix rate"]]
    return seconds


def best(seconds: dict[str, list[float]], prefix: str, kind: str) -> str:
    names = [name for name in seconds if name.startswith(prefix) and name.endswith(kind)]
    return min(names, key=lambda name: statistics.median(seconds[name]))


def report(seconds: dict[str, list[float]], loads: dict[str, list[dict]], imports: list[float]) -> str:
    table, s = Table(), seconds
    mixtral_prefill = best(s, "mixtral", "prefill")
    compiled, plain = "grok bf16 compiled decode", "grok bf16 decode"
    uncompiled = {name: values for name, values in s.items() if "compiled" not in name}
    for mixtral in dict.fromkeys(best(rivals, "mixtral", "decode") for rivals in (s, uncompiled)):
        label = mixtral if "compiled" in mixtral else f"{mixtral.removesuffix(' decode')} plain decode"
        table.add(f"decode bf16 compiled: speed over {label}", divide(s[mixtral], s[compiled]), 2.5)
        table.add(f"decode bf16 plain: speed over {label}", divide(s[mixtral], s[plain]), 1.5)
    table.add("decode bf16 compiled: time over its read limit", divide(s[compiled], s["bf16 limit"]), 1.6, True)
    if "llama.cpp bf16 decode" in s:
        llama = {kind: s[f"llama.cpp {kind}"] for kind in ("bf16 decode", "q8_0 decode", "bf16 prefill")}
        table.add("decode bf16 compiled: speed over llama.cpp bf16", divide(llama["bf16 decode"], s[compiled]), 0.9)
        int8 = s["grok int8 compiled decode"]
        table.add("decode int8 compiled: speed over llama.cpp q8_0", divide(llama["q8_0 decode"], int8), 1.0)
    table.add(
        "decode int8 compiled: time over its read limit",
        divide(s["grok int8 compiled decode"], s["int8 limit"]),
        1.6,
        True,
    )
    ours = s["grok bf16 prefill"]
    table.add(f"prefill {PREFILL}: speed over {mixtral_prefill}", divide(s[mixtral_prefill], ours), 1.0)
    if "llama.cpp bf16 prefill" in s:
        table.add(f"prefill {PREFILL}: speed over llama.cpp bf16", divide(s["llama.cpp bf16 prefill"], ours), 2.0)
    table.add(
        "decode int8 compiled: speed over the JAX way", divide(s["jax way decode"], s["grok int8 compiled decode"]), 10
    )
    table.add("decode bf16 compiled: speed over the JAX way", divide(s["jax way decode"], s[compiled]), 10)
    table.add(f"prefill {PREFILL} bf16: speed over the JAX way", divide(s["jax way prefill"], ours), 4)
    loaded, read, fused = loads["bf16 from_pretrained"], loads["bf16 safetensors"], loads["fused from_pretrained"]
    weights = loaded[0]["weights"]
    pairs = divide([run["seconds"] for run in loaded], [run["seconds"] for run in read])
    table.add("from_pretrained: time over reading with safetensors", pairs, 1.3, True)
    table.add("from_pretrained: peak memory over the weights", [run["peak"] / weights for run in loaded], 1.05, True)
    table.add("fused folder: anonymous memory over the weights", [run["peak"] / weights for run in fused], 0.02, True)
    table.add("import modeling_grok1: seconds added", imports, 0.2, True)

    rates = [("contestant", "decode, ms a token", f"prefill of {PREFILL}, tokens/s"), ("---", "--:", "--:")]
    for label in dict.fromkeys(name.removesuffix(" decode").removesuffix(" prefill") for name in seconds):
        cells = [label]
        for kind, scale in (("decode", lambda t: f"{1000 * t:.1f}"), ("prefill", lambda t: f"{PREFILL / t:.0f}")):
            values = seconds.get(f"{label} {kind}")
            cells.append(scale(statistics.median(values)) if values else "")
        if any(cells[1:]):
            rates.append(tuple(cells))
    limits = [f"{kind}: {1000 * statistics.median(s[f'{kind} limit']):.1f} ms a token" for kind in ("bf16", "int8")]
    share = 100 * statistics.median(divide(s["prefill limit"], ours))
    sentences = [
        f"Reading: {1e-9 / statistics.median(s['bandwidth']):.1f} GB/s, so the limits of decoding are",
        f"{' and '.join(limits)}. bfloat16 products: {1e-12 / statistics.median(s['matrix rate']):.2f} TFLOP/s;",
        f"the prompt of {PREFILL} runs at {share:.0f} % of it.",
        f"A layer is {weights / SIZES['num_hidden_layers'] / 1e6:.0f} MB of {weights / 1e9:.2f} GB.",
    ]
    lines = [f"| {' | '.join(row)} |" for row in rates]
    return "\n\n".join([table.markdown(), "\n".join(lines), " ".join(sentences)])


def machine(threads: int) -> str:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    features = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in Path("/proc/cpuinfo").read_text()]
    versions = {"torch": torch, "transformers": transformers, "grok1": grok1}
    numbers = ", ".join(f"{name} {module.__version__}" for name, module in versions.items())
    return (
        f"{model}, {threads} threads, {' '.join(features) or platform.machine()}; "
        f"Python {platform.python_version()}, {numbers}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="at least 5 for a table to be kept")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    interop = Path(__file__).resolve().parents[1] / ".cache" / "interop"
    found = [*interop.glob("venv/bin/python"), *interop.glob("llama.cpp-*/convert_hf_to_gguf.py")]
    parser.add_argument(
        "--llama",
        nargs=2,
        type=Path,
        metavar=("PYTHON", "CONVERTER"),
        default=found if len(found) == 2 else None,
        help="an environment with llama-cpp-python, and llama.cpp's converter; by default those of `make interop`",
    )
    parser.add_argument("--out", type=Path, help="where to keep the tables; each round is kept in FILE.partial.json")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--racer", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if arguments.load:
        load(arguments.load[0], Path(arguments.load[1]), Path(arguments.load[2]))
        return
    if arguments.racer:
        answer(arguments.racer[0], Path(arguments.racer[1]))
        return
    with tempfile.TemporaryDirectory(prefix="bench-speed-") as name:
        paths = build(Path(name), arguments)
        gc.collect()
        loads = loading(paths, arguments.rounds)
        imports = import_seconds(arguments.rounds)
        seconds = race(paths, arguments)
    text = f"{machine(arguments.threads)}; {arguments.rounds} rounds.\n\n{report(seconds, loads, imports)}\n"
    print(text)
    if arguments.out:
        kept = arguments.out.read_text() if arguments.out.exists() else ""
        before, _, _ = kept.partition("<!-- measured -->")
        arguments.out.write_text(f"{before}<!-- measured -->\n\n{text}")
        arguments.out.with_suffix(".partial.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
