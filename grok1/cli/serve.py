"""`grok1 serve`: a converted folder behind OpenAI's API, by Transformers' own server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from grok1.cli.options import AttnImplementation, ConvertedFolder, DeviceMap, ExpertCache, ExpertsOn, LoadingPrecision


EXAMPLES = """
grok1 serve grok-1-hf
grok1 serve grok-1-hf --continuous-batching --port 8080
grok1 serve grok-1-hf --chat-template chat.jinja --precision int8
"""


class LogLevel(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


# A table of its own: the second name would take the room of the other options' names.
BATCHING, GRAPHS, SERVER = "Continuous batching", "Continuous batching, CUDA graphs", "Server"


def serve_command(
    folder: ConvertedFolder,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja file that formats a chat as a prompt.", exists=True, dir_okay=False),
    ] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Batch requests; default: one at a time.")
    ] = False,
    cb_block_size: Annotated[
        int | None, typer.Option(metavar="N", min=4, help="Tokens per cache block.", rich_help_panel=BATCHING)
    ] = None,
    cb_num_blocks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Cache blocks; default: by free memory.", rich_help_panel=BATCHING),
    ] = None,
    cb_max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tokens per forward pass; default: by free memory.", rich_help_panel=BATCHING
        ),
    ] = None,
    cb_max_memory_percent: Annotated[
        float | None,
        typer.Option(metavar="P", min=0.0, max=1.0, help="Fraction of free memory to use.", rich_help_panel=BATCHING),
    ] = None,
    cb_use_cuda_graph: Annotated[
        bool | None,
        typer.Option("--cb-use-cuda-graph/--no-cb-cuda-graph", help="CUDA graphs.", rich_help_panel=GRAPHS),
    ] = None,
    precision: LoadingPrecision = "auto",
    device_map: DeviceMap = "auto",
    experts_on: ExpertsOn = None,
    expert_cache: ExpertCache = None,
    attn_implementation: AttnImplementation = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Address to listen on.", rich_help_panel=SERVER)
    ] = "localhost",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Port; 0 selects a free one.", rich_help_panel=SERVER)
    ] = 8000,
    enable_cors: Annotated[
        bool,
        typer.Option("--enable-cors", help="Allow requests from web pages of any origin.", rich_help_panel=SERVER),
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="Log level of the server; info logs every request.", rich_help_panel=SERVER)
    ] = LogLevel.WARNING,
) -> None:
    """Serve OpenAI's API: completions, streaming, and chat with a template of your choice."""
    from rich.console import Console

    from grok1.cli.progress import starting
    from grok1.downloads import local_folder
    from grok1.serving.start import Settings, check_settings, listen_on, start

    sizes: dict[str, Any] = {
        "page_size": cb_block_size,
        "num_blocks": cb_num_blocks,
        "max_batch_tokens": cb_max_batch_tokens,
        "max_memory_percent": cb_max_memory_percent,
        "use_cuda_graph": cb_use_cuda_graph,
    }
    placement = {"experts_on": experts_on, "expert_cache": expert_cache}
    settings = Settings(
        folder=local_folder(folder),
        chat_template=chat_template,
        precision=precision,
        model_kwargs={name: value for name, value in placement.items() if value is not None},
        device_map=device_map,
        attn_implementation=attn_implementation,
        continuous_batching=continuous_batching,
        sizes={name: value for name, value in sizes.items() if value is not None},
        enable_cors=enable_cors,
        log_level=log_level,
    )
    with starting("torch and Transformers"):
        check_settings(settings)
        bound = listen_on(host, port)  # before the minutes of loading

    def ready(name: str) -> None:
        address = f"http://{host}:{bound.getsockname()[1]}"
        Console(highlight=False).print(f"Serving {name} at {address}/v1", soft_wrap=True)

    start(settings, bound, ready)
