"""`grok1 eval`: the perplexity of a text, and top-1 agreement with another model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import AsJson, ConvertedFolder, DeviceMap, LoadingPrecision


EXAMPLES = """
grok1 eval grok-1-hf --text text.txt
grok1 eval grok-1-hf --text text.txt --precision nf4 --against grok-1-hf
"""


def eval_command(
    folder: ConvertedFolder,
    text: Annotated[Path, typer.Option(help="Text file (UTF-8) to predict.", exists=True, dir_okay=False)],
    against: Annotated[
        Path | None,
        typer.Option(
            help="Report top-1 agreement with this folder's model in bfloat16; may be FOLDER.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    precision: LoadingPrecision = "auto",
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window; windows do not overlap.")] = 512,
    device_map: DeviceMap = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a text, and top-1 agreement with the bfloat16 model."""
    from grok1.analysis.evaluate import evaluate
    from grok1.cli.progress import count_progress

    with count_progress("Predicting tokens") as progress:
        found = evaluate(
            folder,
            text.read_text(encoding="utf-8"),
            against=against,
            precision=precision,
            context=context,
            device_map=device_map,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2, allow_nan=False))
        return
    typer.echo(f"precision   {found.precision}, {found.bytes:,} bytes of weights")
    typer.echo(
        f"perplexity  {found.perplexity:.4f} ({found.nats:.5f} nats per token; {found.predicted:,} tokens, windows of "
        f"{found.context} that do not overlap, the first token of each not predicted)"
    )
    if found.agreement is not None:
        typer.echo(f"agreement   {found.agreement:.2%} of top-1 tokens as {found.against} in bfloat16")
