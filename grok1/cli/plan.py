"""`grok1 plan`: does the model fit on these GPUs, and which command runs it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grok1.cli.options import PrecisionOption


if TYPE_CHECKING:
    from grok1.sizing.hardware import Gpus
    from grok1.sizing.plan import Plan

EXAMPLES = """
grok1 plan --gpus 8x80GB --precision int8
grok1 plan --gpus 2x8x80GB --context 8192 --batch 4 grok-1-hf
"""
WAYS = {
    "one": "one GPU",
    "tp": "tensor parallel: each GPU computes a share of every head and expert",
    "ep": "tensor parallel attention, expert parallel experts: each GPU holds whole experts",
    "pp": "pipeline: each GPU holds some of the layers, one GPU works at a time",
    "offload": "one GPU, the experts outside it",
}


def plan_command(
    gpus: Annotated[str, typer.Option(help="GPUs and their memory: 8x80GB, 24GB, or 2x8x80GB for two machines.")],
    precision: PrecisionOption = "bfloat16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, prompt and output together.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    parallel: Annotated[str, typer.Option(help="tp, ep, pp, or auto for the fastest that the sizes allow.")] = "auto",
    chunk: Annotated[int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens processed at a time.")] = 512,
    folder: Annotated[
        Path, typer.Argument(help="The converted folder; its config.json is used where it exists, else the release's.")
    ] = Path("grok-1-hf"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Check whether Grok-1 fits on these GPUs, what would make it fit, and how to run it. Loads no weights."""
    from grok1.sizing.hardware import Gpus
    from grok1.sizing.plan import make_plan, suggestions
    from grok1.sizing.request import Request
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


def print_plan(plan: Plan, gpus: Gpus, others: list[tuple[str, Plan]]) -> None:
    """The table of what each GPU holds, the verdict, and the command."""
    from rich.console import Console
    from rich.table import Table

    from grok1.sizing.hardware import GB
    from grok1.sizing.plan import RESERVED

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{gpus}, {plan.precision}, {plan.batch} x {plan.context:,} tokens: {WAYS[plan.parallel]}")
    table = Table(caption=f"GB (10^9 bytes); {RESERVED / GB:.0f} GB of each GPU is kept free for CUDA")
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
    missing = -min(share.free for share in plan.shares)
    console.print(f"It does not fit: it is {missing / GB:,.1f} GB short on the fullest GPU.", style="red")
    if not others:
        console.print("No other precision, batch or placement makes it fit on this hardware.")
        return
    console.print("What would make it fit:")
    for text, other in others:
        console.print(f"  {text}: {min(share.free for share in other.shares) / GB:,.1f} GB free", markup=False)
    console.print(f"\nThe first of them ({others[0][0]}):\n", markup=False)
    console.print(others[0][1].command, markup=False)
