"""The tables of `grok1 plan --gpus`, and the same as JSON."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from grok1.sizing.commands import vllm_command
from grok1.sizing.hardware import GB
from grok1.sizing.plan import RESERVED, Plan, Share
from grok1.sizing.request import Request


WAYS = {
    "one": "one GPU",
    "tp": "tensor parallel: each GPU computes a share of every head and expert",
    "ep": "tensor parallel attention, expert parallel experts: each GPU holds whole experts",
    "pp": "pipeline: each GPU holds some of the layers, one GPU works at a time",
    "offload": "one GPU, the experts outside it",
}


def gigabytes(size: float) -> str:
    return f"{size / GB:,.1f}"


def speed(plan: Plan) -> str:
    """The bound on tokens/s, or nothing where the cards are unknown."""
    if plan.tokens_per_second is None:
        return ""
    return f"at most {plan.tokens_per_second:,.3g} tokens/s"


def print_plan(title: str, request: Request, plan: Plan, others: list[tuple[str, Plan]]) -> None:
    """What each GPU holds, the verdict, and the commands."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{title} in {plan.precision}, {plan.batch} x {plan.context:,} tokens, on {request.gpus}")
    console.print(f"{WAYS[plan.parallel]}")
    table = Table(caption=f"GB = 10^9 bytes; {RESERVED / GB:.0f} GB per GPU is kept free for CUDA")
    table.add_column("GPU", justify="right")
    table.add_column("holds")
    for column in ("weights", "KV cache", "activations", "free"):
        table.add_column(column, justify="right")
    for numbers, share in folded(plan.shares):
        figures = (share.weights, share.cache, share.activations, share.free)
        style = None if share.free >= 0 else "red"
        table.add_row(numbers, share.holds, *map(gigabytes, figures), style=style)
    console.print(table)
    if plan.fits:
        console.print(f"It fits{'; ' + speed(plan) if speed(plan) else ''}. Run it with\n")
        console.print(plan.command)
        print_vllm(request, console)
        return
    missing = -min(share.free for share in plan.shares)
    console.print(f"It does not fit: it is {gigabytes(missing)} GB short on the fullest GPU.", style="red")
    if not others:
        console.print("No other precision, batch or placement makes it fit on this hardware.")
        return
    console.print("What would make it fit:")
    options = Table(box=None, pad_edge=False)
    for column in ("change", "GB free", "tokens/s at most"):
        options.add_column(column, justify="left" if column == "change" else "right")
    for text, other in others:
        bound = "" if other.tokens_per_second is None else f"{other.tokens_per_second:,.3g}"
        options.add_row(text, gigabytes(min(share.free for share in other.shares)), bound)
    console.print(options)
    console.print(f"\nThe first of them ({others[0][0]}):\n")
    console.print(others[0][1].command)


def print_vllm(request: Request, console: Console) -> None:
    line = vllm_command(request)
    if line is not None:
        console.print(f"\nFor many users, with vLLM:\n\n{line}")


def folded(shares: tuple[Share, ...]) -> list[tuple[str, Share]]:
    """Consecutive GPUs that hold the same, as one row: "0-7"."""
    rows = []
    for _, group in groupby(shares, lambda share: dataclasses.replace(share, gpu=0)):
        same = list(group)
        numbers = str(same[0].gpu) if len(same) == 1 else f"{same[0].gpu}-{same[-1].gpu}"
        rows.append((numbers, same[0]))
    return rows


def plan_json(title: str, request: Request, plan: Plan, others: list[tuple[str, Plan]]) -> dict[str, Any]:
    return {
        "model": title,
        "bytes_per_gpu": request.gpus.memory,
        **dataclasses.asdict(plan),
        "fits": plan.fits,
        "vllm": vllm_command(request) if plan.fits else None,
        "would_fit": [
            {"change": text, "tokens_per_second": other.tokens_per_second, "command": other.command}
            for text, other in others
        ],
    }
