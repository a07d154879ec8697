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


def check_experts_on(value: str | None) -> str | None:
    """The value, where it is a place; else click's error for an option."""
    if value not in (None, "cpu", "disk"):
        raise typer.BadParameter(f"expected cpu or disk, found {value!r}.")
    return value


ExpertsOn = Annotated[
    str | None,
    typer.Option(
        metavar="[cpu|disk]",
        help="Keep the experts in host memory or on disk and read the routed ones.",
        callback=check_experts_on,
        rich_help_panel=LOADING,
    ),
]
ExpertCache = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Device memory for recent experts, such as 40GB.", rich_help_panel=LOADING),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="eager, flash_attention_2, flex_attention, ...", rich_help_panel=LOADING),
]
