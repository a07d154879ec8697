"""The curves of a training run: losses, and the balance of the routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grok1.analysis.figures import PALETTE, new_figure, style


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves_figure(
    log: Sequence[dict[str, Any]], active: int | None = None, experts: int | None = None, title: str = ""
) -> Figure:
    """The figure, 10 inches wide: the losses on the left, the load-balancing loss of the routers on the right.

    Args:
        log: entries of the Trainer's log, with `step` and `loss`, `eval_loss` or `aux_loss`.
        active: experts per token, the value of `aux_loss` where all experts are chosen equally often.
        experts: experts of a layer, its value where the same experts get every token.
        title: above the figure.

    Raises:
        ValueError: the log has no entry with a loss.
        ConversionError: matplotlib is not installed.
    """
    if not any("loss" in entry for entry in log):
        raise ValueError("training log: expected entries with `loss`, found none.")
    figure = new_figure(height=3.6)
    with style():
        loss, balance = figure.subplots(1, 2)
        for name, colour, label in (("loss", PALETTE[4], "training"), ("eval_loss", PALETTE[5], "evaluation")):
            _draw(loss, log, name, colour, label)
        loss.set(title="Loss (nats per token)", xlabel="step")
        loss.legend(frameon=False)
        scale = ""
        if _draw(balance, log, "aux_loss", PALETTE[2], "load-balancing loss"):
            if active is not None and experts is not None:
                balance.axhline(active, color="grey", linestyle=":", linewidth=1)
                scale = f"; {active} = uniform load, {experts} = the same experts for every token"
        else:
            text = "not logged: needs Grok1Trainer\nand output_router_logits=True"
            balance.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
        balance.set(title="Balance of the routers (load-balancing loss, no unit)", xlabel=f"step{scale}")
        if title:
            figure.suptitle(title, fontsize=11)
    return figure


def _draw(axis: Any, log: Sequence[dict[str, Any]], name: str, colour: str, label: str) -> bool:
    """Plot the entries that have `name`; whether there are any."""
    points = [(entry["step"], entry[name]) for entry in log if name in entry and "step" in entry]
    if points:
        marker = "o" if len(points) < 20 else ""
        axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3, linewidth=1.3)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    return bool(points)
