"""Whether the model fits on given GPUs, what each of them holds, and what would make it fit."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from grok1.precision import PRECISIONS
from grok1.sizing.commands import python_command, run_command
from grok1.sizing.hardware import GB
from grok1.sizing.memory import Memory, dequantized_matrix, layer_activations, model_memory
from grok1.sizing.request import Request


# A margin, not a measurement: the CUDA context, kernels and their workspaces, fragmentation of the allocator.
RESERVED = GB


@dataclass(frozen=True)
class Share:
    """What one GPU holds, in bytes; `free` is negative where it does not fit."""

    gpu: int
    holds: str
    weights: int
    cache: int
    activations: int
    free: int


@dataclass(frozen=True)
class Plan:
    """One way to run the model; see `make_plan`."""

    parallel: str
    precision: str
    context: int
    batch: int
    shares: tuple[Share, ...]
    command: str

    @property
    def fits(self) -> bool:
        return all(share.free >= 0 for share in self.shares)


def activation_bytes(request: Request, parallel: str) -> int:
    """Peak bytes on one GPU beside weights and cache: the last chunk of the prompt, behind a full cache."""
    config: Any = copy.deepcopy(request.config)
    chunk = min(request.chunk, request.context)
    if parallel in ("tp", "ep"):
        config.num_attention_heads //= request.gpus.count
        config.num_key_value_heads //= request.gpus.count
    if parallel == "tp":
        config.intermediate_size //= request.gpus.count
    peak, _ = layer_activations(config, request.row.dtype, chunk, request.batch, request.context - chunk)
    return peak + dequantized_matrix(request.config, request.row)


def check_parallel(request: Request, parallel: str) -> None:
    """Raise ValueError where the model cannot be split so."""
    from modeling_grok1.loading_grok1 import check_parallelism

    count = request.gpus.count
    if parallel in ("tp", "ep"):
        if not request.row.sharded:
            raise ValueError(
                f"`parallel`: {request.precision} has one nn.Linear per matrix, which neither tensor nor expert "
                "parallelism splits: use pp."
            )
        blocks = getattr(request.config, "quantization_config", None) or {}
        blocks = blocks.get("scale_blocks", 8) if isinstance(blocks, dict) else blocks.scale_blocks
        if request.precision == "int8" and blocks % count != 0:
            raise ValueError(f"`parallel`: expected a divisor of the {blocks} int8 scale blocks, found {count} GPUs.")
    elif request.gpus.nodes > 1 and not request.row.sharded:
        raise ValueError(f"`gpus`: {request.precision} runs on the GPUs of one machine only.")
    config = copy.copy(request.config)
    config.distributed_config = SimpleNamespace(
        tp_size=count if parallel in ("tp", "ep") else 1,
        ep_size=count if parallel == "ep" else 1,
        pp_size=count if parallel == "pp" else 1,
    )
    check_parallelism(config)


def choose_parallel(request: Request) -> str:
    """`parallel` itself, or for "auto" the fastest that the sizes allow: tp, ep, pp."""
    if request.gpus.count == 1:
        return "one"
    if request.parallel != "auto":
        check_parallel(request, request.parallel)
        return request.parallel
    for parallel in ("tp", "ep"):
        try:
            check_parallel(request, parallel)
        except ValueError:
            continue
        return parallel
    check_parallel(request, "pp")
    return "pp"


def layers_of(request: Request, gpu: int) -> range:
    """The layers of a GPU in "pp": over several machines as Transformers' pipeline assigns them, else evenly."""
    layers, count = request.config.num_hidden_layers, request.gpus.count
    if request.gpus.nodes > 1:
        each = layers // count
        return range(gpu * each, layers if gpu == count - 1 else (gpu + 1) * each)
    return range(-(-gpu * layers // count), -(-(gpu + 1) * layers // count))


def split_evenly(request: Request, parallel: str, memory: Memory) -> list[tuple[str, int, int]]:
    """What each GPU holds, its weights and its cache in bytes, for "one", "tp" and "ep"."""
    count = request.gpus.count
    replicated = sum(memory.weights.get(kind, 0) for kind in ("router", "norms"))
    weights = replicated + -(-(memory.weights_bytes - replicated) // count)
    cache = memory.kv_bytes(request.context * request.batch) // count
    experts = f"{request.config.num_experts // count} experts per layer"
    holds = {
        "one": "everything",
        "tp": f"1/{count} of each matrix",
        "ep": f"{experts}, 1/{count} of the rest",
    }[parallel]
    return [(holds, weights, cache)] * count


def split_by_layers(request: Request, memory: Memory) -> list[tuple[str, int, int]]:
    """What each GPU holds, its weights and its cache in bytes, for "pp"."""
    count, layers = request.gpus.count, request.config.num_hidden_layers
    cache = memory.kv_bytes(request.context * request.batch)
    embedding, head = memory.weights.get("embedding", 0), memory.weights.get("head", 0)
    shares = []
    for gpu in range(count):
        mine = layers_of(request, gpu)
        weights = sum(memory.layers[i] for i in mine)
        holds = f"layers {mine.start} to {mine.stop - 1}"
        if gpu == 0:
            weights, holds = weights + embedding, f"embedding, {holds}"
        if gpu == count - 1:
            # A pipeline over processes keeps a copy of the tied embedding on its last stage, for the head.
            tied_copy = embedding if request.gpus.nodes > 1 and not head else 0
            weights += memory.outside_layers - embedding + tied_copy
        shares.append((holds, weights, cache * len(mine) // layers))
    return shares


def make_plan(request: Request, memory: Memory | None = None) -> Plan:
    """
    What each GPU holds when `request.config` runs as requested, and the command for it.

    Weights and cache are exact: the bytes of the meta model's tensors, divided as the parallel plans in its config
    divide them. Activations are those of `activation_bytes`. `RESERVED` bytes of every GPU stay unused.

    Raises:
        ValueError: an argument out of range, or the model cannot be split into so many parts.
    """
    request.check()
    memory = memory or model_memory(request.config, request.precision, prompt=1)
    parallel = choose_parallel(request)
    activations = activation_bytes(request, parallel)
    shares = split_by_layers(request, memory) if parallel == "pp" else split_evenly(request, parallel, memory)
    capacity = request.gpus.memory - RESERVED
    return Plan(
        parallel=parallel,
        precision=request.precision,
        context=request.context,
        batch=request.batch,
        shares=tuple(
            Share(gpu, holds, weights, cache, activations, capacity - weights - cache - activations)
            for gpu, (holds, weights, cache) in enumerate(shares)
        ),
        command=run_command(request, parallel),
    )


def make_offload_plan(request: Request, memory: Memory | None = None) -> Plan:
    """Everything but the experts on one GPU, with buffers for the experts in transfer; the rest caches experts."""
    request.check()
    memory = memory or model_memory(request.config, request.precision, prompt=1)
    experts = memory.weights["experts"]
    expert = experts // (request.config.num_hidden_layers * request.config.num_experts)
    weights = memory.weights_bytes - experts
    activations = activation_bytes(request, "one") + (request.config.num_experts_per_tok + 1) * expert
    cache = memory.kv_bytes(request.context * request.batch)
    free = request.gpus.memory - RESERVED - weights - activations - cache
    budget = max(0, free // expert * expert)
    command = python_command(
        request, f"device_map=0, experts_on='disk', expert_cache={f'{budget / GB:.0f}GB' if budget else None!r}"
    )
    share = Share(0, "all but the experts", weights, cache, activations, free)
    return Plan("offload", request.precision, request.context, request.batch, (share,), command)


def suggestions(request: Request) -> list[tuple[str, Plan]]:
    """Changes that make it fit, each of them computed, the smallest change first."""
    changes: list[tuple[str, dict]] = []
    if request.batch > 1:
        changes.append((f"a batch of {request.batch // 2}", {"batch": request.batch // 2}))
        changes.append(("a batch of 1", {"batch": 1}))
    if request.context > 2048:
        changes.append(("a context of 2048 tokens", {"context": 2048}))
    order = list(PRECISIONS)
    changes += [
        (f"precision {precision}", {"precision": precision})
        for precision in ("bfloat16", "int8", "nf4")
        if order.index(precision) > order.index(request.precision)
    ]
    for times in (2, 4):
        gpus = dataclasses.replace(request.gpus, nodes=request.gpus.nodes * times)
        if request.gpus.per_node * times <= 8 and request.gpus.nodes == 1:
            gpus = dataclasses.replace(request.gpus, per_node=request.gpus.per_node * times)
        changes.append((f"{gpus} instead", {"gpus": gpus, "parallel": "auto"}))

    fitting = []
    for text, change in changes:
        try:
            plan = make_plan(dataclasses.replace(request, **change))
        except ValueError:
            continue
        if plan.fits:
            fitting.append((text, plan))
    for precision in dict.fromkeys((request.precision, "int8")):
        if PRECISIONS[precision].offloaded:
            offload = make_offload_plan(dataclasses.replace(request, precision=precision))
            if offload.fits:
                what = "the experts on disk, read when they are routed to, on one GPU"
                fitting.append((f"{what} ({precision})", offload))
    return fitting
