"""The table of `grok1 plan --mac`, and the same as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from grok1.cli.plan_tables import gigabytes
from grok1.sizing.hardware import GB, MAC_SHARE, Mac
from grok1.sizing.mac import MacPlan


def print_macs(title: str, count: int, mac: Mac, context: int, batch: int, plans: list[MacPlan]) -> None:
    """Every format on these Macs, and the command of the first that fits."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    machines = f"{count} x " if count > 1 else ""
    console.print(
        f"{title}, {batch} x {context:,} tokens, on {machines}{mac.name}, {mac.memory // GB} GB "
        f"({mac.memory * MAC_SHARE / GB:.0f} GB usable), {mac.bandwidth // GB} GB/s"
    )
    table = Table(caption="GB = 10^9 bytes per Mac; tokens/s by bandwidth, one sequence")
    for column in ("format", "weights", "KV cache", "free", "tokens/s at most"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for plan in plans:
        figures = (gigabytes(plan.weights), gigabytes(plan.cache), gigabytes(plan.free))
        bound = f"{plan.tokens_per_second:.1f}" if plan.fits else "does not fit"
        table.add_row(plan.format.name, *figures, bound, style=None if plan.fits else "red")
    console.print(table)
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        console.print("It does not fit: take more Macs (2x512, 4x256, ...) or more memory.", style="red")
        return
    console.print(f"{fitting[0].format.name} fits. Run it with mlx-lm (`pip install mlx-lm`):\n")
    console.print(fitting[0].command)


def mac_json(plans: list[MacPlan]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(plan), "fits": plan.fits} for plan in plans]
