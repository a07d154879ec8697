"""`grok1 routing`: which experts a text visits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def routing_command(
    folder: Annotated[Path, typer.Argument(help="A converted folder with a tokenizer.", exists=True, file_okay=False)],
    text: Annotated[Path, typer.Option(help="Text file (UTF-8) to route.", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="Picture to write (.png, .svg or .pdf).")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write, with every token coloured by its expert.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use, from its beginning.")] = 2048,
    passage: Annotated[int, typer.Option(min=1, help="Tokens in the picture's strip.")] = 48,
    dtype: Annotated[str, typer.Option(help="Precision to run in.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Draw which experts a text visits: load, router entropy and top pair by layer, tokens coloured by expert."""
    from transformers import AutoTokenizer

    from grok1.analysis.routing import (
        RoutingStatistics,
        load_bars,
        readable,
        routing_figure,
        routing_page,
        routing_statistics,
        save_figure,
    )
    from modeling_grok1 import Grok1ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] == 0:
        raise ValueError(f"{text}: expected text, found an empty file.")
    model = Grok1ForCausalLM.from_pretrained(folder, dtype=dtype, device_map="auto").eval()
    rows = ids.to(model.device).split(model.config.max_position_embeddings, dim=1)
    statistics = RoutingStatistics.join([routing_statistics(model, row) for row in rows])
    pieces = [readable(piece) for piece in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    title = f"{text.name}: {ids.shape[1]:,} tokens through {len(statistics.experts)} layers"
    if out is not None:
        save_figure(routing_figure(statistics, pieces[:passage], title), out)
    if html is not None:
        html.write_text(routing_page(statistics, pieces, title), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(statistics.to_dict()))
        return
    typer.echo(title)
    typer.echo(load_bars(statistics))
