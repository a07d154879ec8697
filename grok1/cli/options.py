"""Options that several commands share, so that they have the same name, words and choices everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grok1.precision import AUTO, PRECISIONS, find_precision


LOADING = "Loading"


def check_precision(value: str) -> str:
    """The value, where it is "auto" or a known precision; else click's error for an option."""
    if value != AUTO:
        try:
            find_precision(value)
        except ValueError as error:
            raise typer.BadParameter(str(error).removeprefix("`precision`: ")) from None
    return value


PrecisionOption = Annotated[
    str, typer.Option(metavar="NAME", help=f"{', '.join(PRECISIONS)}.", callback=check_precision)
]
LoadingPrecision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"auto (as stored), {', '.join(PRECISIONS)}. The quantised ones quantise while loading.",
        callback=check_precision,
        rich_help_panel=LOADING,
    ),
]
DeviceMap = Annotated[
    str, typer.Option(help="Where the layers go: auto, cpu, cuda, cuda:0, ...", rich_help_panel=LOADING)
]
ConvertedFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A converted folder with a tokenizer.", exists=True, file_okay=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
