"""Which experts a text visits: statistics of the routers, a picture, a page, and a few characters for a terminal."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grok1.errors import ConversionError


if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from modeling_grok1 import Grok1ForCausalLM

# Okabe and Ito's palette, made to be told apart with every kind of colour vision (https://jfly.uni-koeln.de/color/).
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
DARK = {"#0072B2", "#000000"}
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RoutingStatistics:
    """What the routers decided. L layers, N tokens, E experts, k experts that a token visits.

    Args:
        experts: L N k, integers: the chosen experts, the likeliest first.
        gates: L N k, float32: their probabilities, which sum to less than 1 (they are not renormalised).
        token_entropy: L N, float32: entropy of the router's distribution over all E experts, in bits; at most log2(E).
        num_experts: E.
    """

    experts: np.ndarray
    gates: np.ndarray
    token_entropy: np.ndarray
    num_experts: int

    @cached_property
    def load(self) -> np.ndarray:
        """L E: the share of a layer's visits that an expert gets; rows sum to 1, 1/E is even."""
        counts = [np.bincount(layer.ravel(), minlength=self.num_experts) for layer in self.experts]
        return np.stack(counts) / self.experts[0].size

    @property
    def entropy(self) -> np.ndarray:
        """L: mean entropy of the router over the tokens, in bits."""
        return self.token_entropy.mean(axis=1)

    @property
    def gate_mass(self) -> np.ndarray:
        """L: mean probability on the experts that are visited together; what is missing to 1 is dropped."""
        return self.gates.sum(axis=2).mean(axis=1)

    @cached_property
    def top_pairs(self) -> list[tuple[tuple[int, ...], float]]:
        """L: the set of experts that is chosen most often in a layer, and the share of the tokens that choose it."""
        pairs = []
        for layer in np.sort(self.experts, axis=2):
            sets, counts = np.unique(layer, axis=0, return_counts=True)
            pairs.append((tuple(int(e) for e in sets[counts.argmax()]), float(counts.max() / len(layer))))
        return pairs

    def to_dict(self) -> dict[str, Any]:
        """The figures by layer, for JSON."""
        return {
            "layers": len(self.experts),
            "tokens": self.experts.shape[1],
            "load": self.load.tolist(),
            "entropy_bits": self.entropy.tolist(),
            "gate_mass": self.gate_mass.tolist(),
            "top_pairs": [{"experts": list(experts), "share": share} for experts, share in self.top_pairs],
        }

    @classmethod
    def join(cls, parts: Sequence[RoutingStatistics]) -> RoutingStatistics:
        """The statistics of several texts as of one, their tokens in order."""
        return cls(
            experts=np.concatenate([part.experts for part in parts], axis=1),
            gates=np.concatenate([part.gates for part in parts], axis=1),
            token_entropy=np.concatenate([part.token_entropy for part in parts], axis=1),
            num_experts=parts[0].num_experts,
        )


def routing_statistics(
    model: Grok1ForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> RoutingStatistics:
    """Run a text through the model and record what every router decided.

    Args:
        model: either layout of experts, any precision.
        input_ids: B T.
        attention_mask: B T, 0 where a token is padding, which is left out; all tokens count where None.

    Returns:
        The statistics of the tokens of all rows, one row after the other.
    """
    import torch

    if input_ids.shape[1] > model.config.max_position_embeddings:
        raise ValueError(
            f"`input_ids`: expected at most {model.config.max_position_embeddings} tokens a row, found "
            f"{input_ids.shape[1]}. Split the text into rows."
        )
    with torch.no_grad():
        outputs = model.base_model(
            input_ids, attention_mask=attention_mask, use_cache=False, output_router_logits=True
        )
    real = slice(None) if attention_mask is None else attention_mask.flatten().bool().cpu()
    # A router keeps its batch flattened: N E a layer.
    logits = torch.stack([layer.float().cpu()[real] for layer in outputs.router_logits])
    probabilities = logits.softmax(dim=-1)
    gates, experts = probabilities.topk(model.config.num_experts_per_tok, dim=-1)
    entropy = -(probabilities * probabilities.clamp_min(1e-30).log2()).sum(dim=-1)
    return RoutingStatistics(experts.numpy(), gates.numpy(), entropy.numpy(), model.config.num_experts)


def load_bars(statistics: RoutingStatistics) -> str:
    """A line a layer with a bar for each expert: a full block is at least twice its even share."""
    lines = []
    for layer, load in enumerate(statistics.load):
        heights = np.clip(np.ceil(load * statistics.num_experts / 2 * (len(BLOCKS) - 1)), 0, len(BLOCKS) - 1)
        lines.append(f"layer {layer:>2} ▕{' '.join(BLOCKS[int(height)] for height in heights)}▏")
    return "\n".join(lines)


def routing_figure(statistics: RoutingStatistics, tokens: Sequence[str], title: str = "") -> Figure:
    """The picture, 1000 pixels wide: load, entropy and top pair by layer; below, a passage by expert.

    Args:
        statistics: of the whole text.
        tokens: the first tokens of the text, as they are to be written below the strip.
        title: above the picture.
    """
    try:
        import matplotlib
        from matplotlib.colors import BoundaryNorm, ListedColormap, TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConversionError(
            f"The picture needs matplotlib ({error}).",
            next_step='Install it with `pip install "modeling-grok1[plot]"`.',
        ) from None

    layers, experts = statistics.load.shape
    shown = min(len(tokens), statistics.experts.shape[1])
    rows = np.arange(layers)
    ticks = rows if layers <= 16 else np.arange(0, layers, 8)
    height = min(4.0, 1.2 + 0.24 * layers)
    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans", "axes.titlesize": 9.5}):
        figure = Figure(figsize=(10, 2 * height + 1.2), dpi=100, layout="constrained")
        (top,), (bottom,) = figure.subfigures(2, 1, squeeze=False)
        load, entropy, pair = top.subplots(1, 3, width_ratios=[1.5, 1, 1])

        even, peak = 100 / experts, 100 * max(2 / experts, float(statistics.load.max()))
        image = load.imshow(
            statistics.load * 100, cmap="PuOr_r", norm=TwoSlopeNorm(even, vmin=0, vmax=peak), aspect="auto"
        )
        load.set(title="Load: share of a layer's visits", xlabel="expert", ylabel="layer", xticks=range(experts))
        load.set_yticks(ticks)
        if layers <= 16:
            for (layer, expert), share in np.ndenumerate(statistics.load):
                ink = "white" if 100 * share > even + 0.7 * (peak - even) or share < 0.2 / experts else "black"
                load.annotate(f"{share:.0%}", (expert, layer), ha="center", va="center", fontsize=7.5, color=ink)
        bar = top.colorbar(image, ax=load, pad=0.02)
        bar.set_ticks([0, even, peak], labels=["0 %", f"{even:.3g} %\n(even)", f"{peak:.0f} %"])

        style: dict[str, Any] = {"marker": "o" if layers <= 16 else "", "markersize": 4, "linewidth": 1.5}
        entropy.plot(statistics.entropy, rows, color=PALETTE[4], **style)
        entropy.axvline(np.log2(experts), color="grey", linestyle=":", linewidth=1)
        entropy.set(title="Entropy of the router", xlabel="bits (dotted: all experts alike)", xlim=(0, None))

        shares = np.array([share for _, share in statistics.top_pairs])
        pair.plot(statistics.gate_mass * 100, rows, color=PALETTE[5], label="probability on the chosen pair", **style)
        pair.plot(
            shares * 100, rows, color=PALETTE[2], linestyle="--", label="tokens with the commonest pair", **style
        )
        pair.set(xlabel="The top pair (%)", xlim=(0, 100))
        pair.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        for axis in (entropy, pair):
            axis.set_ylim(layers - 0.5, -0.5)
            axis.set_yticks(ticks)
            axis.grid(axis="x", color="0.9")
            axis.spines[["top", "right"]].set_visible(False)

        strip = bottom.subplots()
        colours = ListedColormap([PALETTE[e % len(PALETTE)] for e in range(experts)])
        first = statistics.experts[:, :shown, 0]
        norm = BoundaryNorm(np.arange(experts + 1) - 0.5, experts)
        drawn = strip.imshow(first, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
        strip.set(title="A passage: the first expert of every token", ylabel="layer")
        strip.set_yticks(ticks)
        strip.set_xticks(range(shown), [_visible(token) for token in tokens[:shown]], rotation=90, fontsize=8)
        strip.tick_params(axis="x", length=0)
        strip.set_xticks(np.arange(shown + 1) - 0.5, minor=True)
        strip.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        strip.grid(which="minor", color="white", linewidth=0.8 if layers <= 16 else 0.3)
        strip.tick_params(which="minor", length=0)
        bottom.colorbar(drawn, ax=strip, ticks=range(experts), pad=0.01, label="expert")
        if title:
            figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture (its suffix says the format: png, svg, pdf); the same figure gives the same bytes."""
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if path.suffix not in undated:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(undated)}, found {path.suffix or 'none'}.")
    figure.savefig(path, metadata=undated[path.suffix])


def routing_page(statistics: RoutingStatistics, tokens: Sequence[str], title: str) -> str:
    """A page in HTML without scripts: the text once a layer, every token on the colour of its first expert.

    Colour is never the only sign: the number of the expert follows its token, and pointing at it tells both experts
    and their gates.

    Args:
        statistics: of the text.
        tokens: its tokens, as text.
        title: of the page.
    """
    shown = min(len(tokens), statistics.experts.shape[1])
    legend = " ".join(_span(f"expert {e}", e, "") for e in range(statistics.num_experts))
    sections = []
    layers = len(statistics.experts)
    for layer, (experts, gates) in enumerate(zip(statistics.experts, statistics.gates, strict=True)):
        spans = []
        for position in range(shown):
            chosen = ", ".join(f"{e} ({gate:.2f})" for e, gate in zip(experts[position], gates[position], strict=True))
            spans.append(_span(tokens[position], int(experts[position, 0]), f"experts {chosen}"))
        opened = " open" if layer in (0, layers // 2, layers - 1) else ""
        (first, share), entropy = statistics.top_pairs[layer], statistics.entropy[layer]
        pair = " and ".join(str(e) for e in first)
        summary = f"Layer {layer}: {entropy:.2f} bits; experts {pair} together for {share:.0%} of the tokens"
        sections.append(f"<details{opened}><summary>{summary}</summary><p>{''.join(spans)}</p></details>")
    return PAGE.format(title=html.escape(title), legend=legend, sections="\n".join(sections))


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.9 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
p {{ white-space: pre-wrap; font-family: ui-monospace, monospace; font-size: 15px; }}
span {{ padding: 1px 2px; border-radius: 3px; }}
sub {{ font-size: 9px; opacity: .8; }}
summary {{ cursor: pointer; }}
</style>
<h1>{title}</h1>
<p>{legend}</p>
{sections}
</html>
"""


def _span(text: str, expert: int, hint: str) -> str:
    colour = PALETTE[expert % len(PALETTE)]
    ink = "#fff" if colour in DARK else "#000"
    hint = f' title="{html.escape(hint)}"' if hint else ""
    number = f"<sub>{expert}</sub>" if hint else ""
    return f'<span style="background:{colour};color:{ink}"{hint}>{html.escape(text)}{number}</span>'


def readable(piece: str) -> str:
    """A piece of a SentencePiece vocabulary as the text that it stands for; a byte beyond ASCII stays `<0xE2>`."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and int(piece[3:5], 16) < 128:
        return chr(int(piece[3:5], 16))
    return piece.replace("▁", " ")


def _visible(token: str) -> str:
    """A token for an axis: blanks and line breaks made visible, a long one cut."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·").replace("$", r"\$")
    return shown if len(shown) <= 10 else shown[:9] + "…"
