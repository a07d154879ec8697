"""`grok1 routing`: the expert routing of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import AsJson, ConvertedFolder, DeviceMap, LoadingPrecision


EXAMPLES = """
grok1 routing grok-1-hf --text text.txt --out routing.png --out routing.svg
grok1 routing grok-1-hf --text text.txt --html routing.html --tokens 512
"""


def routing_command(
    folder: ConvertedFolder,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text file (UTF-8) to route.", exists=True, dir_okay=False)
    ],
    out: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Figure to write (.png, .svg or .pdf); repeat for more.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page to write, every token coloured by its expert.")
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Use at most this many tokens of the text.")] = 2048,
    passage: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens in the passage of the figure.")] = 48,
    precision: LoadingPrecision = "auto",
    device_map: DeviceMap = "auto",
    as_json: AsJson = False,
) -> None:
    """Show the expert routing of a text: load, router entropy and top pair per layer, tokens coloured by expert."""
    from grok1.cli.progress import starting
    from grok1.downloads import local_folder
    from grok1.files import write_file

    with starting("torch and Transformers"):
        import transformers  # noqa: F401

        from grok1.analysis.routing import RoutingStatistics, load_bars, readable, routing_statistics
        from grok1.loading import check_device_map, check_folder, load_model, load_tokenizer

    folder = local_folder(folder)
    check_folder(folder)
    check_device_map(device_map)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] == 0:
        raise ValueError(f"{text}: expected text, found an empty file.")
    model = load_model(folder, precision, device_map=device_map)
    rows = ids.to(model.device).split(model.config.max_position_embeddings, dim=1)
    statistics = RoutingStatistics.join([routing_statistics(model, row) for row in rows])
    pieces = [readable(piece) for piece in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    title = f"{text.name}: {ids.shape[1]:,} tokens through {len(statistics.experts)} layers"
    if out:
        from grok1.analysis.figures import routing_figure, save_figure

        figure = routing_figure(statistics, pieces[:passage], title)
        for path in out:
            save_figure(figure, path)
    if html is not None:
        from grok1.analysis.page import routing_page

        write_file(html, routing_page(statistics, pieces, title))
    if as_json:
        typer.echo(json.dumps(statistics.to_dict(), allow_nan=False))
        return
    typer.echo(f"{title}. Expert load by layer:")
    typer.echo(load_bars(statistics))
