"""Whether the model fits on given GPUs, what each of them holds, and what would make it fit."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from grok1.precision import PRECISIONS
from grok1.sizing.commands import offload_command, run_command
from grok1.sizing.hardware import GB, Gpus
from grok1.sizing.memory import Memory, dequantized_matrix, layer_activations, model_memory
from grok1.sizing.request import Request
from grok1.sizing.speed import step_seconds


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
    """One way to run the model; see `make_plan`.

    Args:
        parallel: "one", "tp", "ep", "pp" or "offload".
        precision, context, batch: as requested.
        shares: what each GPU holds.
        command: the code to paste.
        tokens_per_second: an upper bound by bandwidth, all sequences together; None where the bandwidth is unknown.
    """

    parallel: str
    precision: str
    context: int
    batch: int
    shares: tuple[Share, ...]
    command: str
    tokens_per_second: float | None = None

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
        holds = f"{len(mine)} layers"
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
        tokens_per_second=_speed(request, step_seconds(request, parallel, memory, request.gpus)),
    )


def _speed(request: Request, seconds: float | None) -> float | None:
    return None if seconds is None else request.batch / seconds


def make_offload_plan(request: Request, place: str, memory: Memory | None = None) -> Plan:
    """Everything but the experts on one GPU, with buffers for the experts in transfer; the rest caches experts.

    Args:
        request: on its first GPU.
        place: "cpu" (host memory) or "disk".
        memory: of the model, where it is known already.

    Raises:
        ValueError: the precision cannot run so, or the host memory is too small.
    """
    request.check()
    if not request.row.offloaded:
        raise ValueError(f"`precision`: {request.precision} cannot keep experts outside the GPU.")
    memory = memory or model_memory(request.config, request.precision, prompt=1)
    experts = memory.weights["experts"]
    if place == "cpu" and experts > request.host_memory:
        raise ValueError(f"`host_memory`: expected {experts:,} bytes for the experts, found {request.host_memory:,}.")
    expert = experts // (request.config.num_hidden_layers * request.config.num_experts)
    weights = memory.weights_bytes - experts
    activations = activation_bytes(request, "one") + (request.config.num_experts_per_tok + 1) * expert
    cache = memory.kv_bytes(request.context * request.batch)
    free = request.gpus.memory - RESERVED - weights - activations - cache
    budget = max(0, free // expert * expert)
    share = Share(
        0, f"all but the experts ({'host memory' if place == 'cpu' else place})", weights, cache, activations, free
    )
    link = request.gpus.card.link if request.gpus.card is not None else None
    outside = link if place == "cpu" else min(request.disk, link or request.disk)
    seconds = step_seconds(request, "offload", memory, request.gpus, outside, budget / experts)
    return Plan(
        parallel="offload",
        precision=request.precision,
        context=request.context,
        batch=request.batch,
        shares=(share,),
        command=offload_command(request, place, budget),
        tokens_per_second=_speed(request, seconds),
    )


def suggestions(request: Request) -> list[tuple[str, Plan]]:
    """Changes that make it fit, each of them computed: on the same hardware by speed, then more hardware."""
    here = [(text, _try(request, change)) for text, change in _smaller_requests(request)]
    one = dataclasses.replace(request, gpus=dataclasses.replace(request.gpus, nodes=1, per_node=1))
    for precision in dict.fromkeys((request.precision, "int8")):
        for place, words in (("cpu", "in host memory"), ("disk", f"on disk, {request.disk / GB:g} GB/s")):
            text = f"one GPU, experts {words} ({precision})"
            here.append((text, _try_offload(dataclasses.replace(one, precision=precision), place)))
    fitting = [(text, plan) for text, plan in here if plan is not None and plan.fits]
    fitting.sort(key=lambda pair: -(pair[1].tokens_per_second or 0) / pair[1].batch)
    larger = [
        (f"{gpus} instead", _try(request, {"gpus": gpus, "parallel": "auto"})) for gpus in _more_gpus(request.gpus)
    ]
    return fitting + [(text, plan) for text, plan in larger if plan is not None and plan.fits]


def _smaller_requests(request: Request) -> list[tuple[str, dict[str, Any]]]:
    """Smaller batches, shorter contexts and smaller precisions, in words and as changes of the request."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if request.batch > 1:
        changes.append((f"a batch of {request.batch // 2}", {"batch": request.batch // 2}))
    if request.batch > 3:
        changes.append(("a batch of 1", {"batch": 1}))
    if request.context > 2048:
        changes.append(("a context of 2048 tokens", {"context": 2048}))
    order = list(PRECISIONS)
    return changes + [
        (f"precision {precision}", {"precision": precision, "parallel": "auto"})
        for precision in ("bfloat16", "int8", "nf4")
        if order.index(precision) > order.index(request.precision)
    ]


def _more_gpus(gpus: Gpus) -> list[Gpus]:
    """Twice and four times as many: in the same machine up to eight, else in more machines."""
    more = []
    for times in (2, 4):
        if gpus.per_node * times <= 8 and gpus.nodes == 1:
            more.append(dataclasses.replace(gpus, per_node=gpus.per_node * times))
        else:
            more.append(dataclasses.replace(gpus, nodes=gpus.nodes * times))
    return more


def _try(request: Request, change: dict[str, Any]) -> Plan | None:
    """The changed plan; None where the model cannot be split so."""
    try:
        return make_plan(dataclasses.replace(request, **change))
    except ValueError:
        return None


def _try_offload(request: Request, place: str) -> Plan | None:
    try:
        return make_offload_plan(request, place)
    except ValueError:
        return None
