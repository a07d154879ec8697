"""`grok1 plan`: whether the model fits on these GPUs, measured on the meta device, and the command that runs it so."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grok1.sizing.memory import PRECISIONS, Memory, meta_model, model_memory, peak_bytes


if TYPE_CHECKING:
    from modeling_grok1 import GrokConfig

GB = 10**9
# CUDA's context, kernels and their workspaces, what the allocator cannot use. Not a measurement of yours: a margin.
RESERVED = GB
PARALLEL = ("auto", "tp", "ep", "pp")
WHAT_THEY_ARE = {
    "one": "one GPU",
    "tp": "tensor parallel: each GPU computes a share of every head and expert",
    "ep": "tensor parallel attention, expert parallel experts: each GPU has whole experts",
    "pp": "layers one after the other: each GPU has some of them, one works at a time",
    "offload": "one GPU, the experts outside it",
}
QUANTIZATION = {
    "int8-bnb": "BitsAndBytesConfig(load_in_8bit=True)",
    "nf4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype='bfloat16')",
    "nf4-double": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
    "bnb_4bit_compute_dtype='bfloat16')",
    "fp4": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='fp4', bnb_4bit_compute_dtype='bfloat16')",
}


@dataclass(frozen=True)
class Gpus:
    """`nodes` machines with `per_node` GPUs each, of `memory` bytes each."""

    nodes: int
    per_node: int
    memory: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """From "8x80GB", "24GB", or with the number of machines first, "2x8x80GB". Raises ValueError."""
        match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip(), re.IGNORECASE)
        if match is None or int(match[1] or 1) * int(match[2] or 1) == 0:
            raise ValueError(f"`--gpus`: expected GPUs as in 8x80GB, 24GB or 2x8x80GB (two machines), found {text!r}.")
        unit = 2**30 if match[4].lower() == "gib" else GB
        return cls(nodes=int(match[1] or 1), per_node=int(match[2] or 1), memory=int(float(match[3]) * unit))

    def __str__(self) -> str:
        machines = f"{self.nodes} machines, each " if self.nodes > 1 else ""
        return f"{machines}{self.per_node} x {self.memory / GB:.0f} GB"


@dataclass(frozen=True)
class Share:
    """What one GPU holds, in bytes; `free` is below zero where it does not fit."""

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


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        config: the model's sizes.
        gpus: the hardware.
        precision: key of `memory.PRECISIONS`.
        context: tokens of a sequence, prompt and answer together.
        batch: sequences at a time.
        parallel: one of `PARALLEL`.
        chunk: tokens of the prompt that are read at a time (`prefill_chunk_size` of `generate`).
        folder: the converted folder, for the command.
    """

    config: GrokConfig
    gpus: Gpus
    precision: str = "bfloat16"
    context: int = 8192
    batch: int = 1
    parallel: str = "auto"
    chunk: int = 512
    folder: str = "grok-1-hf"

    def check(self) -> None:
        problems = []
        if self.precision not in PRECISIONS:
            problems.append(f"`precision`: expected one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.parallel not in PARALLEL:
            problems.append(f"`parallel`: expected one of {', '.join(PARALLEL)}, found {self.parallel!r}")
        if not 1 <= self.context <= self.config.max_position_embeddings:
            longest = self.config.max_position_embeddings
            problems.append(f"`context`: expected 1 to {longest} tokens, found {self.context}")
        problems += [
            f"`{name}`: expected at least 1, found {value}"
            for name, value in (("batch", self.batch), ("chunk", self.chunk))
            if value < 1
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")


def activation_bytes(request: Request, parallel: str) -> int:
    """
    Most bytes that live on one GPU beside weights and cache, measured on one layer of the meta model: a chunk of the
    prompt is read behind a cache that is full up to it. Eager attention, logits of the last token.
    """
    import torch
    from transformers import DynamicCache

    config: Any = copy.deepcopy(request.config)
    batch = request.batch
    chunk = min(request.chunk, request.context)
    config.num_hidden_layers = 1
    if parallel in ("tp", "ep"):
        config.num_attention_heads //= request.gpus.count
        config.num_key_value_heads //= request.gpus.count
    if parallel == "tp":
        config.intermediate_size //= request.gpus.count
    model = meta_model(config, PRECISIONS[request.precision].dtype)
    cache = DynamicCache(config=config)
    shape = (batch, config.num_key_value_heads, request.context - chunk, config.head_dim)
    before = torch.empty(shape, dtype=model.dtype, device="meta")
    cache.update(before, before, 0)
    tokens = torch.zeros(batch, chunk, dtype=torch.long, device="meta")
    peak = peak_bytes(
        lambda: model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1),
        given=[tokens, *model.parameters(), *model.buffers()],
    )
    layer: Any = cache.layers[0]
    return peak - layer.keys.nbytes - layer.values.nbytes


def check_parallel(request: Request, parallel: str) -> None:
    """Raise ValueError where the model cannot be cut so."""
    from modeling_grok1.loading_grok1 import check_parallelism

    count = request.gpus.count
    if parallel in ("tp", "ep"):
        if request.precision in QUANTIZATION:
            raise ValueError(
                f"`parallel`: {request.precision} has an nn.Linear for each matrix, which neither tensor nor expert "
                "parallelism cuts: use pp."
            )
        blocks = getattr(request.config, "quantization_config", None) or {}
        blocks = blocks.get("scale_blocks", 8) if isinstance(blocks, dict) else blocks.scale_blocks
        if request.precision == "int8" and blocks % count != 0:
            raise ValueError(f"`parallel`: expected a divisor of the {blocks} int8 scale blocks, found {count} GPUs.")
    elif request.gpus.nodes > 1 and request.precision in QUANTIZATION:
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
    """The layers of a GPU in "pp": over several machines as Transformers' pipeline deals them out, else evenly."""
    layers, count = request.config.num_hidden_layers, request.gpus.count
    if request.gpus.nodes > 1:
        each = layers // count
        return range(gpu * each, layers if gpu == count - 1 else (gpu + 1) * each)
    return range(-(-gpu * layers // count), -(-(gpu + 1) * layers // count))


def make_plan(request: Request, memory: Memory | None = None) -> Plan:
    """
    What each GPU holds when `request.config` runs as asked, and the command that does it.

    Weights and cache are exact: the bytes of the meta model's tensors, divided as the parallel plans in its config
    divide them. Activations are those of `activation_bytes`. `RESERVED` bytes of every GPU stay unused.

    Raises:
        ValueError: an argument out of range, or the model cannot be cut into so many parts.
    """
    request.check()
    memory = memory or model_memory(request.config, request.precision, prompt=1)
    parallel, count = choose_parallel(request), request.gpus.count
    activations = activation_bytes(request, parallel)
    if PRECISIONS[request.precision].dequantizes:
        activations += request.config.hidden_size * request.config.intermediate_size * 2
    cache = memory.kv_bytes(request.context * request.batch)
    layers = request.config.num_hidden_layers
    whole = sum(memory.weights.get(kind, 0) for kind in ("router", "norms"))

    shares = []
    for gpu in range(count):
        if parallel in ("one", "tp", "ep"):
            weights = whole + -(-(memory.weights_bytes - whole) // count)
            experts = f"{request.config.num_experts // count} experts a layer"
            holds = {"one": "everything", "tp": f"1/{count} of each matrix", "ep": f"{experts}, 1/{count} of the rest"}
            shares.append((holds[parallel], weights, cache // count))
        else:
            mine = layers_of(request, gpu)
            weights = sum(memory.layers[i] for i in mine)
            holds_layers = f"layers {mine.start} to {mine.stop - 1}"
            ends = memory.weights.get("embedding", 0), memory.weights.get("head", 0)
            if gpu == 0:
                weights, holds_layers = weights + ends[0], f"embedding, {holds_layers}"
            if gpu == count - 1:
                # A pipeline over processes keeps the tied embedding at its end too, for the head.
                tied_copy = ends[0] if request.gpus.nodes > 1 and not ends[1] else 0
                weights += memory.outside_layers - ends[0] + tied_copy
            shares.append((holds_layers, weights, cache * len(mine) // layers))
    capacity = request.gpus.memory - RESERVED
    return Plan(
        parallel=parallel,
        precision=request.precision,
        context=request.context,
        batch=request.batch,
        shares=tuple(
            Share(gpu, holds, weights, kept, activations, capacity - weights - kept - activations)
            for gpu, (holds, weights, kept) in enumerate(shares)
        ),
        command=run_command(request, parallel),
    )


def make_offload_plan(request: Request, memory: Memory | None = None) -> Plan:
    """Everything but the experts on one GPU, with room for the experts that are on their way, the rest as a cache."""
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
    """What would make it fit, each tried, smallest change first."""
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
        if precision in ("float32", "bfloat16", "int8"):
            offload = make_offload_plan(dataclasses.replace(request, precision=precision))
            if offload.fits:
                what = "the experts on disk, read as they are routed, on one GPU"
                fitting.append((f"{what} ({precision})", offload))
    return fitting


def python_command(request: Request, placement: str) -> str:
    """A Python program that loads the model so and generates."""
    dtype = PRECISIONS[request.precision].dtype
    lines = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    options = [f"dtype=torch.{dtype}", placement]
    if request.precision in QUANTIZATION:
        lines[1] += ", BitsAndBytesConfig"
        options.append(f"quantization_config={QUANTIZATION[request.precision]}")
    lines += ["import modeling_grok1", ""]
    if request.precision == "int8":
        lines.append("# a folder written by `grok1 convert --dtype int8`")
    lines += [
        f"folder = {request.folder!r}",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"model = AutoModelForCausalLM.from_pretrained(folder, {', '.join(options)})",
        f'batch = tokenizer(["The answer to life"] * {request.batch}, return_tensors="pt").to(model.device)',
        f"tokens = model.generate(**batch, max_new_tokens=64, prefill_chunk_size={request.chunk})",
        "print(tokenizer.batch_decode(tokens, skip_special_tokens=True)[0])",
    ]
    return "\n".join(lines)


def run_command(request: Request, parallel: str) -> str:
    """What to paste: a Python program for one process, torchrun for several."""
    gpus, count = request.gpus, request.gpus.count
    if parallel == "one":
        return python_command(request, "device_map=0")
    if parallel == "pp" and gpus.nodes == 1:
        layers = request.config.num_hidden_layers
        ends = f"'model.embed_tokens': 0, 'lm_head': 0, 'model.rotary_emb': 0, 'model.norm': {count - 1}"
        between = f"f'model.layers.{{i}}': i * {count} // {layers} for i in range({layers})"
        return python_command(request, f"device_map={{{ends}, **{{{between}}}}}")
    nodes = ""
    if gpus.nodes > 1:
        nodes = f"--nnodes {gpus.nodes} --rdzv-backend c10d --rdzv-id grok1 --rdzv-endpoint HOST:29500 "
    sizes = {"tp": f"--tp {count}", "ep": f"--tp {count} --ep {count}", "pp": f"--pp {count}"}[parallel]
    int8 = "# a folder written by `grok1 convert --dtype int8`\n" if request.precision == "int8" else ""
    options = f"{sizes} --dtype {PRECISIONS[request.precision].dtype} --prefill-chunk {request.chunk}"
    example = f"examples/generate_distributed.py {request.folder} {options}"
    return f'{int8}torchrun {nodes}--nproc-per-node {gpus.per_node} {example} "The answer to life"'


def print_plan(plan: Plan, gpus: Gpus, others: list[tuple[str, Plan]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{gpus}, {plan.precision}, {plan.batch} x {plan.context:,} tokens: {WHAT_THEY_ARE[plan.parallel]}")
    table = Table(caption=f"GB (10^9 bytes); {RESERVED / GB:.0f} GB of each GPU is left to CUDA itself")
    table.add_column("GPU", justify="right")
    table.add_column("holds")
    for column in ("weights", "KV cache", "activations", "free"):
        table.add_column(column, justify="right")
    for share in plan.shares:
        figures = (share.weights, share.cache, share.activations, share.free)
        style = None if share.free >= 0 else "red"
        table.add_row(str(share.gpu), share.holds, *(f"{figure / GB:,.1f}" for figure in figures), style=style)
    console.print(table)
    if plan.fits:
        console.print("It fits. Run it with\n")
        console.print(plan.command, markup=False)
        return
    lacking = -min(share.free for share in plan.shares)
    console.print(f"It does not fit: the fullest GPU lacks {lacking / GB:,.1f} GB.", style="red")
    if not others:
        console.print("Nothing that this command knows makes it fit on this hardware.")
        return
    console.print("What would make it fit:")
    for text, other in others:
        console.print(f"  {text}: {min(share.free for share in other.shares) / GB:,.1f} GB free", markup=False)
    console.print(f"\nThe first of them ({others[0][0]}):\n", markup=False)
    console.print(others[0][1].command, markup=False)


def plan_command(
    gpus: Annotated[str, typer.Option(help="GPUs and their memory: 8x80GB, 24GB, or 2x8x80GB for two machines.")],
    precision: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "bfloat16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, prompt and answer together.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    parallel: Annotated[str, typer.Option(help="tp, ep, pp, or auto for the fastest that the sizes allow.")] = "auto",
    chunk: Annotated[int, typer.Option("--prefill-chunk", min=1, help="Tokens of the prompt read at a time.")] = 512,
    folder: Annotated[
        Path, typer.Argument(help="The converted folder; its config.json is used where it exists, else the release's.")
    ] = Path("grok-1-hf"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell whether Grok-1 fits on these GPUs, what would make it fit, and how to run it. Loads no weights."""
    from modeling_grok1 import GrokConfig

    config = GrokConfig.from_pretrained(folder) if (folder / "config.json").exists() else GrokConfig()
    request = Request(config, Gpus.parse(gpus), precision, context, batch, parallel, chunk, str(folder))
    plan = make_plan(request)
    others = [] if plan.fits else suggestions(request)
    if as_json:
        document = {
            **dataclasses.asdict(plan),
            "fits": plan.fits,
            "would_fit": [{"change": text, "command": other.command} for text, other in others],
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        print_plan(plan, request.gpus, others)
    if not plan.fits:
        raise typer.Exit(1)
