"""Expert routing as an HTML page: the text per layer, coloured by expert."""

from __future__ import annotations

import html
from collections.abc import Sequence

from grok1.analysis.figures import PALETTE
from grok1.analysis.routing import RoutingStatistics


DARK = {"#0072B2", "#000000"}  # colours of the palette that need white text
# Tokens times layers on a page, about 4 MB: browsers stay responsive.
MOST_CELLS = 32_768


def routing_page(statistics: RoutingStatistics, tokens: Sequence[str], title: str) -> str:
    """An HTML page without scripts: the text once per layer, every token coloured by its top-1 expert.

    Colour is never the only cue: the number of the expert follows its token, and the tooltip has all selected experts
    and their gates. The page follows the light or dark setting of the browser and fits any window. It shows the first
    `MOST_CELLS` / layers tokens; the figures above each text are those of all tokens.

    Args:
        statistics: of the text.
        tokens: its tokens, as text.
        title: of the page.
    """
    layers = len(statistics.experts)
    counted = statistics.experts.shape[1]
    shown = min(len(tokens), counted, max(1, MOST_CELLS // layers))
    legend = " ".join(f'<span class="e{e % len(PALETTE)}">expert {e}</span>' for e in range(statistics.num_experts))
    sections = []
    for layer, (experts, gates) in enumerate(zip(statistics.experts, statistics.gates, strict=True)):
        spans = []
        for position in range(shown):
            chosen = ", ".join(f"{e} ({gate:.2f})" for e, gate in zip(experts[position], gates[position], strict=True))
            spans.append(span(tokens[position], int(experts[position, 0]), f"experts {chosen}"))
        opened = " open" if layer in (0, layers // 2, layers - 1) else ""
        (first, share), entropy = statistics.top_pairs[layer], statistics.entropy[layer]
        pair = " and ".join(str(e) for e in first)
        summary = (
            f"Layer {layer}: mean router entropy {entropy:.2f} bits; most frequent pair {pair}, "
            f"{share:.0%} of the tokens"
        )
        sections.append(f"<details{opened}><summary>{summary}</summary><p>{''.join(spans)}</p></details>")
    note = f"{counted:,} tokens" if shown == counted else f"The first {shown:,} of {counted:,} tokens"
    uniform = f"{statistics.uniform_entropy:.3g}"
    return PAGE.format(
        title=html.escape(title),
        note=f"{note}. Each token has the colour and the number of its top-1 expert; point at it for all selected "
        f"experts and their gates. Entropy: {uniform} bits = uniform.",
        colours="\n".join(f".e{i} {{ background: {c}; color: {ink(c)}; }}" for i, c in enumerate(PALETTE)),
        legend=legend,
        sections="\n".join(sections),
    )


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
p {{ overflow-wrap: anywhere; }}
details p {{ white-space: pre-wrap; font: 15px/1.9 ui-monospace, monospace; }}
span {{ padding: 1px 2px; border-radius: 3px; outline: 1px solid color-mix(in srgb, currentcolor 25%, transparent); }}
sub {{ font-size: 9px; line-height: 1; }}
summary {{ cursor: pointer; }}
{colours}
</style>
<h1>{title}</h1>
<p>{note}</p>
<p>{legend}</p>
{sections}
</html>
"""


def ink(colour: str) -> str:
    """The colour of text on a colour of the palette."""
    return "#fff" if colour in DARK else "#000"


def span(text: str, expert: int, hint: str) -> str:
    """A token on the colour of its expert, with the expert's number below and a tooltip."""
    number = expert % len(PALETTE)
    return f'<span class="e{number}" title="{html.escape(hint)}">{html.escape(text)}<sub>{expert}</sub></span>'
