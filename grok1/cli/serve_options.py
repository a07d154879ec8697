"""The options of `grok1 serve` that no other command has."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


# A panel of its own: its second name would narrow the column of the other names.
BATCHING, GRAPHS, SERVER = "Continuous batching", "Continuous batching, CUDA graphs", "Server"


class LogLevel(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


ChatTemplate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Jinja file that formats a chat as a prompt.", exists=True, dir_okay=False),
]
ContinuousBatching = Annotated[
    bool, typer.Option("--continuous-batching", help="Batch requests; default: one at a time.")
]
BlockSize = Annotated[
    int | None, typer.Option(metavar="N", min=4, help="Tokens per cache block.", rich_help_panel=BATCHING)
]
NumBlocks = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Cache blocks; default: by free memory.", rich_help_panel=BATCHING),
]
MaxBatchTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Tokens per forward pass; default: by free memory.", rich_help_panel=BATCHING
    ),
]
MaxMemoryPercent = Annotated[
    float | None,
    typer.Option(metavar="P", min=0.0, max=1.0, help="Fraction of free memory to use.", rich_help_panel=BATCHING),
]
UseCudaGraph = Annotated[
    bool | None,
    typer.Option("--cb-use-cuda-graph/--no-cb-cuda-graph", help="CUDA graphs.", rich_help_panel=GRAPHS),
]
Host = Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.", rich_help_panel=SERVER)]
Port = Annotated[
    int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 selects a free one.", rich_help_panel=SERVER)
]
ServedModelName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the model; default: the folder's.", rich_help_panel=SERVER)
]
AllowedHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Name of this server for the Host header, beside localhost and --host; * is any.",
        rich_help_panel=SERVER,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Key that clients must send.", envvar="GROK1_API_KEY", rich_help_panel=SERVER),
]
MaxBody = Annotated[str, typer.Option(metavar="SIZE", help="Largest request, such as 4MB.", rich_help_panel=SERVER)]
MaxWaiting = Annotated[
    int, typer.Option(metavar="N", min=1, help="Choices under way; more are refused with 429.", rich_help_panel=SERVER)
]
EnableCors = Annotated[
    bool, typer.Option("--enable-cors", help="Allow requests from web pages of any origin.", rich_help_panel=SERVER)
]
LogLevelOption = Annotated[
    LogLevel, typer.Option(help="Log level of the server; info logs every request.", rich_help_panel=SERVER)
]
