"""How fast: the rates of the card, decoding and prompts against them, and where the time goes."""

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from .models import random_grok, random_mixtral, release
from .results import NotHereError, Run


CONTEXT = 256  # positions of the cache: room for every step of a measurement
PROMPT = 8
BANDWIDTH, RATE = "read bandwidth", "bf16 matrix rate"


# --------------------------------------------------------------------------------------------------------------------
# The card
# --------------------------------------------------------------------------------------------------------------------
def card(run: Run) -> None:
    with run.attempt(BANDWIDTH):
        memory = torch.ones(2**20 if run.dry else 2**31, dtype=torch.float32, device=run.device)
        run.value(BANDWIDTH, memory.nbytes / run.seconds(memory.sum) / 1e9, "GB/s", "the sum of 8 GiB")
        del memory
    with run.attempt(RATE):
        rows, D, F = 2048, run.sizes.hidden, run.sizes.intermediate  # noqa: N806
        rows = 16 if run.dry else rows
        x = torch.randn(rows, D, device=run.device, dtype=torch.bfloat16)
        weight = torch.randn(2 * F, D, device=run.device, dtype=torch.bfloat16)
        seconds = run.seconds(lambda: nn.functional.linear(x, weight))
        run.value(RATE, 4 * rows * D * F / seconds / 1e12, "TFLOP/s", f"{rows} rows by {2 * F} x {D}")


# --------------------------------------------------------------------------------------------------------------------
# Limits of a model
# --------------------------------------------------------------------------------------------------------------------
def is_expert(name: str) -> bool:
    return ".experts." in name


def read_bytes(model: nn.Module, batch: int) -> float:
    """Bytes of weights that a decoding step of `batch` tokens reads, with experts chosen evenly. The embedding is
    read as the head."""
    missed = (1 - 2 / 8) ** batch
    return sum(w.nbytes * (1 - missed if is_expert(name) else 1) for name, w in model.named_parameters())


def prompt_flop(model: Any, length: int) -> float:
    """Of the products of a prompt: projections, chosen experts and the visible half of the scores, without head."""
    config = model.config
    D, F, width = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim  # noqa: N806
    keys = config.num_key_value_heads * config.head_dim
    token = 2 * (D * (2 * width + 2 * keys) + 2 * 3 * D * F)
    return config.num_hidden_layers * (length * token + 2 * length**2 * width)


def against(run: Run, seconds: float, amount: float, rate: str, scale: float) -> dict[str, Any]:
    """The time at the rate of the card, and the time taken as its multiple."""
    if rate not in run.known:
        return {"detail": f"the card's {rate} is not known"}
    limit = amount / (run.known[rate] * scale)
    return {
        "detail": f"limit {limit * 1e3:.3f} ms by the {rate}, {seconds / limit:.2f} x of it",
        "limit": limit * 1e3,
        "ratio": seconds / limit,
    }


# --------------------------------------------------------------------------------------------------------------------
# Decoding and prompts
# --------------------------------------------------------------------------------------------------------------------
def tokens(run: Run, batch: int, length: int) -> torch.Tensor:
    return torch.randint(5, run.sizes.vocabulary, (batch, length), device=run.device)


class Decoder:
    """Each call decodes the next position on a static cache. All of it is on the device, so that a CUDA graph of a
    step can be replayed."""

    def __init__(self, run: Run, model: Any, batch: int):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        model(tokens(run, batch, PROMPT), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = tokens(run, batch, 1)
        self.position = torch.full((batch, 1), PROMPT, device=run.device)

    def __call__(self) -> torch.Tensor:
        output = self.model(self.token, past_key_values=self.cache, use_cache=True, position_ids=self.position)
        self.position.add_(1)
        return output.logits


def in_a_graph(run: Run, model: Any, step: Callable[[], Any]) -> Callable[[], None]:
    """`step` recorded as a CUDA graph, which takes no time of the host per kernel."""
    if model.config._experts_implementation == "eager":
        raise NotHereError("the loop over the experts reads the router's choice on the host")
    if run.device.type != "cuda":
        raise NotHereError("no CUDA")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.inference_mode()
def speed(run: Run, label: str, model: Any) -> None:
    run.value(f"{label}: weights", sum(w.nbytes for w in model.parameters()) / 1e9, "GB", f"{count_layers(model)}")
    for batch in run.sizes.decode_batches:
        name = f"{label}: decode, batch {batch}"
        amount = read_bytes(model, batch)
        with run.attempt(name):
            step = Decoder(run, model, batch)
            seconds = run.seconds(step, run.sizes.steps)
            run.value(name, seconds * 1e3, "ms/step", **against(run, seconds, amount, BANDWIDTH, 1e9))
            if batch == 1:
                where_the_time_goes(run, label, model, step)
    for length in run.sizes.prompts:
        name = f"{label}: prompt of {length}"
        with run.attempt(name):
            prompt = tokens(run, 1, length)
            seconds = run.seconds(lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1), 2, 1)
            limits = against(run, seconds, prompt_flop(model, length), RATE, 1e12)
            run.value(name, seconds * 1e3, "ms", **limits)
    for batch in run.sizes.decode_batches:  # last, for a failed capture may spoil what follows
        name = f"{label}: decode, batch {batch}, CUDA graph"
        with run.attempt(name):
            seconds = run.seconds(in_a_graph(run, model, Decoder(run, model, batch)), run.sizes.steps)
            limits = against(run, seconds, read_bytes(model, batch), BANDWIDTH, 1e9)
            run.value(name, seconds * 1e3, "ms/step", **limits)


def count_layers(model: Any) -> str:
    return f"{model.config.num_hidden_layers} layers"


def speed_of(run: Run, precision: str) -> None:
    model = random_grok(run.sizes, precision, run.device)
    speed(run, precision, model)


def speed_of_bf16(run: Run) -> None:
    speed_of(run, "bf16")


def speed_of_int8(run: Run) -> None:
    speed_of(run, "int8")


def speed_of_int4(run: Run) -> None:
    speed_of(run, "int4")


def speed_of_mixtral(run: Run) -> None:
    model = random_mixtral(run.sizes, run.device)
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        speed(run, f"mixtral, {implementation}", model)
        release(run.device)


# --------------------------------------------------------------------------------------------------------------------
# Where the time goes
# --------------------------------------------------------------------------------------------------------------------
class LargeOutputs(TorchDispatchMode):
    """Counts the bytes of new tensors as large as a square of the model's width: copies of weights, for a decoding
    step has no activation of that size."""

    def __init__(self, smallest: int):
        super().__init__()
        self.smallest = smallest
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(output):
            large = isinstance(tensor, torch.Tensor) and tensor.numel() >= self.smallest
            if large and tensor.untyped_storage().data_ptr() not in known:
                self.bytes[str(func)] += tensor.nbytes
        return output


def where_the_time_goes(run: Run, label: str, model: Any, step: Callable[[], Any]) -> None:
    name = f"{label}: copied weight bytes per token"
    with run.attempt(name):
        step()
        with LargeOutputs(run.sizes.hidden**2) as outputs:
            step()
        detail = ", ".join(f"{op} {count:,}" for op, count in outputs.bytes.most_common(3)) or "no copy"
        run.value(name, sum(outputs.bytes.values()), "bytes", detail)
    name = f"{label}: host synchronisations per token"
    with run.attempt(name):
        if run.device.type != "cuda":
            raise NotHereError("no CUDA")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        where = [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        run.value(name, len(found), "", ", ".join(sorted(set(where))) or "none")
    with run.attempt(f"{label}: profile"):
        profile(run, label, step)


def profile(run: Run, label: str, step: Callable[[], Any], steps: int = 4) -> None:
    """The ten kernels (on a CPU: operators) that take the most time of `steps` steps, and copies between memories."""
    on_cuda = run.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_cuda else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        run.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == ("kernel" if on_cuda else "cpu_op"):
            times[event["name"]] += event["dur"]
            calls[event["name"]] += 1
        if event.get("cat") == "gpu_memcpy":
            moved[event["name"]] += event["args"].get("bytes", 0)
    if not times:
        raise NotHereError("the profiler recorded no kernel")
    whole = sum(times.values())
    for rank, (kernel, microseconds) in enumerate(times.most_common(10), start=1):
        detail = f"{microseconds / whole:.0%} of the kernels' time, {calls[kernel] / steps:g} calls: {kernel[:120]}"
        run.value(f"{label}: kernel {rank}", microseconds / steps, "us/step", detail)
    detail = ", ".join(f"{name} {count / steps:,.0f}" for name, count in moved.items()) or "no copy"
    run.value(f"{label}: bytes of memory copies per token", sum(moved.values()) / steps, "bytes", detail)
