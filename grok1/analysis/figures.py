"""Expert routing as a figure: expert load, router entropy and expert pairs per layer, and a passage by expert."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grok1.analysis.routing import RoutingStatistics
from grok1.errors import ConversionError
from grok1.files import write_file


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with every kind of colour vision (https://jfly.uni-koeln.de/color/).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
DETAILED_LAYERS = 16  # up to as many layers every cell has its number and every row its tick


def routing_figure(statistics: RoutingStatistics, tokens: Sequence[str], title: str = "") -> Figure:
    """The figure, 10 inches wide: load, entropy and expert pairs by layer; below, a passage by expert.

    Args:
        statistics: of the whole text.
        tokens: the first tokens of the text, as tick labels of the passage.
        title: above the figure.

    Raises:
        ConversionError: matplotlib is not installed.
    """
    layers = len(statistics.experts)
    height = min(4.0, 1.4 + 0.24 * layers)
    figure = new_figure(2 * height + 1.2)
    with style():
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False)
        load, entropy, pair = top.subplots(1, 3, width_ratios=[1.5, 1, 1])
        _draw_load(top, load, statistics)
        _draw_entropy(entropy, statistics)
        _draw_pairs(pair, statistics)
        _draw_passage(bottom, bottom.subplots(), statistics, tokens)
        if title:
            figure.suptitle(title, fontsize=11)
    return figure


def new_figure(height: float) -> Figure:
    """An empty figure, 10 inches wide, 200 dots per inch in a bitmap. Raises ConversionError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConversionError(
            f"The figure needs matplotlib ({error}).",
            next_step='Install it with `pip install "modeling-grok1[plot]"`.',
        ) from None
    return Figure(figsize=(10, height), dpi=200, layout="constrained")


def style() -> Any:
    """The fonts of the figures, as a context."""
    import matplotlib

    return matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.titlesize": 9.5})


def _layer_ticks(layers: int) -> np.ndarray:
    return np.arange(layers) if layers <= DETAILED_LAYERS else np.arange(0, layers, 8)


def _draw_load(parent: Any, axis: Any, statistics: RoutingStatistics) -> None:
    """A heat map, layers by experts: percent of a layer's assignments, white where it is uniform."""
    from matplotlib.colors import TwoSlopeNorm

    layers, experts = statistics.load.shape
    uniform, peak = 100 / experts, 100 * max(2 / experts, float(statistics.load.max()))
    norm = TwoSlopeNorm(uniform, vmin=0, vmax=peak)
    image = axis.imshow(statistics.load * 100, cmap="PuOr_r", norm=norm, aspect="auto")
    axis.set(
        title="Expert load: share of a layer's\nassignments (%, white = uniform)",
        xlabel="expert",
        ylabel="layer",
        xticks=range(experts),
    )
    axis.set_yticks(_layer_ticks(layers))
    if layers <= DETAILED_LAYERS:
        for (layer, expert), share in np.ndenumerate(statistics.load):
            dark = 100 * share > uniform + 0.7 * (peak - uniform) or share < 0.2 / experts
            ink = "white" if dark else "black"
            axis.annotate(f"{share:.0%}", (expert, layer), ha="center", va="center", fontsize=7.5, color=ink)
    bar = parent.colorbar(image, ax=axis, pad=0.02)
    bar.set_ticks([0, uniform, peak], labels=["0 %", f"{uniform:.3g} %\n(uniform)", f"{peak:.0f} %"])


def _line_style(layers: int) -> dict[str, Any]:
    return {"marker": "o" if layers <= DETAILED_LAYERS else "", "markersize": 4, "linewidth": 1.5}


def _finish_lines(axis: Any, layers: int) -> None:
    axis.set_ylim(layers - 0.5, -0.5)
    axis.set_yticks(_layer_ticks(layers))
    axis.grid(axis="x", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_entropy(axis: Any, statistics: RoutingStatistics) -> None:
    """Mean router entropy by layer, with a dotted line at the uniform distribution."""
    layers, experts = statistics.load.shape
    axis.plot(statistics.entropy, np.arange(layers), color=PALETTE[4], **_line_style(layers))
    axis.axvline(np.log2(experts), color="grey", linestyle=":", linewidth=1)
    uniform = f"{np.log2(experts):.3g}"
    axis.set(
        title="Router entropy: mean\nover the tokens (bits)", xlabel=f"bits ({uniform} = uniform)", xlim=(0, None)
    )
    _finish_lines(axis, layers)


def _draw_pairs(axis: Any, statistics: RoutingStatistics) -> None:
    """Probability of the selected experts, and the share of the most frequent set of experts, by layer."""
    layers = len(statistics.experts)
    shares = np.array([share for _, share in statistics.top_pairs])
    rows, style = np.arange(layers), _line_style(layers)
    axis.plot(statistics.gate_mass * 100, rows, color=PALETTE[5], **style)
    axis.plot(shares * 100, rows, color=PALETTE[2], linestyle="--", **style)
    axis.set(title="Expert pairs: gate sum and\nmost frequent pair (%)", xlim=(0, 100))
    axis.set_xlabel("% (solid: gate sum of the selected pair;\ndashed: tokens with the most frequent pair)")
    _finish_lines(axis, layers)


def _draw_passage(parent: Any, axis: Any, statistics: RoutingStatistics, tokens: Sequence[str]) -> None:
    """A colour per token and layer: its top-1 expert."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    layers, experts = statistics.load.shape
    shown = min(len(tokens), statistics.experts.shape[1])
    colours = ListedColormap([PALETTE[e % len(PALETTE)] for e in range(experts)])
    norm = BoundaryNorm(np.arange(experts + 1) - 0.5, experts)
    first = statistics.experts[:, :shown, 0]
    drawn = axis.imshow(first, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axis.set(title="Top-1 expert of each token of a passage (colour = expert)", ylabel="layer")
    axis.set_yticks(_layer_ticks(layers))
    axis.set_xticks(range(shown), [tick_label(token) for token in tokens[:shown]], rotation=90, fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.set_xticks(np.arange(shown + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8 if layers <= DETAILED_LAYERS else 0.3)
    axis.tick_params(which="minor", length=0)
    parent.colorbar(drawn, ax=axis, ticks=range(experts), pad=0.01, label="expert")


def tick_label(token: str) -> str:
    """A token as a tick label: blanks and line breaks made visible, a long one cut."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·").replace("$", r"\$")
    return shown if len(shown) <= 10 else shown[:9] + "…"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix selects the format (.png, .svg, .pdf), and equal figures give equal bytes.

    Raises:
        ValueError: another suffix.
    """
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if path.suffix not in undated:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(undated)}, found {path.suffix or 'none'}.")
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "grok1"}):
        figure.savefig(content, format=path.suffix[1:], metadata=undated[path.suffix])
    write_file(path, content.getvalue())
