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


def check_size(value: str) -> str:
    """The value, unless it is a number without a unit: `--max-shard-size 5` would mean five bytes."""
    if value.strip().replace(".", "", 1).isdigit():
        raise typer.BadParameter(f"expected a size with a unit, such as {value}GB or {value}MB, found {value!r}.")
    return value


def check_repository(value: str | None) -> str | None:
    """The value, where it is USER/NAME; else click's error for an option."""
    from grok1.downloads import REPOSITORY

    if value is not None and not REPOSITORY.fullmatch(value):
        raise typer.BadParameter(f"expected USER/NAME, found {value!r}.")
    return value


PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"{', '.join(PRECISIONS)}.",
        callback=check_precision,
        autocompletion=lambda: list(PRECISIONS),
    ),
]
LoadingPrecision = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"auto (as stored), {', '.join(PRECISIONS)}. The quantised ones quantise while loading.",
        callback=check_precision,
        autocompletion=lambda: [AUTO, *PRECISIONS],
        rich_help_panel=LOADING,
    ),
]
DeviceMap = Annotated[
    str, typer.Option(metavar="MAP", help="Where the layers go: auto, cpu, cuda, cuda:0, ...", rich_help_panel=LOADING)
]
# Given to `grok1.downloads.local_folder`.
ConvertedFolder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A converted folder, or USER/NAME on the hub (downloaded).")
]


def check_local(value: Path) -> Path:
    """The value, where it is a folder; else click's error, with the command that downloads a repository."""
    from grok1.downloads import download_command, is_repository

    if value.is_dir():
        return value
    if is_repository(value):
        raise typer.BadParameter(f"no folder {value} here. If it is on the hub: `{download_command(value)}`.")
    raise typer.BadParameter(f"expected a folder, found {'a file' if value.exists() else 'nothing'} at {value}.")


LocalFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A converted folder.", callback=check_local)]
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
        autocompletion=lambda: ["cpu", "disk"],
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
