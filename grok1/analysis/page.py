"""Expert routing as an HTML page: the text per layer, coloured by expert."""

from __future__ import annotations

import html
from collections.abc import Sequence

from grok1.analysis.figures import PALETTE
from grok1.analysis.routing import RoutingStatistics


DARK = {"#0072B2", "#000000"}  # colours of the palette that need white text


def routing_page(statistics: RoutingStatistics, tokens: Sequence[str], title: str) -> str:
    """An HTML page without scripts: the text once per layer, every token coloured by its top-1 expert.

    Colour is never the only cue: the number of the expert follows its token, and the tooltip has all selected experts
    and their gates.

    Args:
        statistics: of the text.
        tokens: its tokens, as text.
        title: of the page.
    """
    shown = min(len(tokens), statistics.experts.shape[1])
    legend = " ".join(span(f"expert {e}", e, "") for e in range(statistics.num_experts))
    sections = []
    layers = len(statistics.experts)
    for layer, (experts, gates) in enumerate(zip(statistics.experts, statistics.gates, strict=True)):
        spans = []
        for position in range(shown):
            chosen = ", ".join(f"{e} ({gate:.2f})" for e, gate in zip(experts[position], gates[position], strict=True))
            spans.append(span(tokens[position], int(experts[position, 0]), f"experts {chosen}"))
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


def span(text: str, expert: int, hint: str) -> str:
    """A token on the colour of its expert, the expert's number below, and a tooltip unless `hint` is empty."""
    colour = PALETTE[expert % len(PALETTE)]
    ink = "#fff" if colour in DARK else "#000"
    hint = f' title="{html.escape(hint)}"' if hint else ""
    number = f"<sub>{expert}</sub>" if hint else ""
    return f'<span style="background:{colour};color:{ink}"{hint}>{html.escape(text)}{number}</span>'
