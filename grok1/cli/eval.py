"""`grok1 eval`: the perplexity of a text, and top-1 agreement with another model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import AsJson, ConvertedFolder, DeviceMap, LoadingPrecision


EXAMPLES = """
grok1 eval grok-1-hf --text text.txt
grok1 eval grok-1-hf --text text.txt --out grok-1-hf/evaluation.json
grok1 eval grok-1-hf --text text.txt --precision nf4 --against grok-1-hf
"""


def eval_command(
    folder: ConvertedFolder,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text file (UTF-8) to predict.", exists=True, dir_okay=False)
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Report top-1 agreement with this model in bfloat16; may be the same."),
    ] = None,
    precision: LoadingPrecision = "auto",
    context: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens of a window; windows do not overlap.")
    ] = 512,
    device_map: DeviceMap = "auto",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the figures as JSON; `grok1 card` reads them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of a text, and top-1 agreement with the bfloat16 model."""
    from grok1.cli.progress import count_progress, starting
    from grok1.downloads import local_folder
    from grok1.files import write_file

    with starting("torch and Transformers"):
        import transformers  # noqa: F401

        from grok1.analysis.evaluate import evaluate

    content = text.read_text(encoding="utf-8")
    with count_progress("Predicting tokens") as progress:
        found = evaluate(
            local_folder(folder),
            content,
            against=None if against is None else local_folder(against),
            precision=precision,
            context=context,
            device_map=device_map,
            progress=progress,
        )
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    figures = json.dumps({**asdict(found), "text": text.name, "text_sha256": sha256}, indent=2, allow_nan=False)
    if out is not None:
        write_file(out, figures + "\n")
    if as_json:
        typer.echo(figures)
        return
    typer.echo(f"precision   {found.precision}, {found.bytes:,} bytes of weights")
    typer.echo(
        f"perplexity  {found.perplexity:.4f} ({found.nats:.5f} nats per token; {found.predicted:,} tokens, windows of "
        f"{found.context} that do not overlap, the first token of each not predicted)"
    )
    if found.agreement is not None:
        typer.echo(f"agreement   {found.agreement:.2%} of top-1 tokens as {found.against} in bfloat16")
