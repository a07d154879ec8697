"""`grok1 curves`: the losses and the routers' balance of a training run, as a figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from grok1.cli.options import LocalFolder


EXAMPLES = """
grok1 curves tuned --out curves.svg
grok1 curves tuned/checkpoint-200 --out curves.png
"""


def curves_command(
    folder: LocalFolder,
    out: Annotated[list[Path], typer.Option(metavar="FILE", help="Figure to write (.png, .svg or .pdf).")],
) -> None:
    """Plot the loss and the load-balancing loss that the Trainer logged, from a folder that it saved."""
    from grok1.analysis.curves import curves_figure
    from grok1.analysis.figures import save_figure
    from grok1.model_card.training_run import RUN_NAME, STATE_NAME, read_training_run

    run = read_training_run(folder)
    if run is None:
        raise ValueError(f"{folder}: expected {RUN_NAME} or {STATE_NAME} of a Trainer, found neither.")
    config = folder / "config.json"
    sizes = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    figure = curves_figure(run.log, sizes.get("num_experts_per_tok"), sizes.get("num_experts"), title=folder.name)
    for path in out:
        save_figure(figure, path)
    typer.echo(f"{', '.join(map(str, out))}: {len(run.losses)} log entries. {run.summary}")
