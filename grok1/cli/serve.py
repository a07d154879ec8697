"""`grok1 serve`: a converted folder behind OpenAI's API, by Transformers' own server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Quantization(StrEnum):
    INT8 = "int8"
    BNB_8BIT = "bnb-8bit"
    BNB_4BIT = "bnb-4bit"


class ExpertsOn(StrEnum):
    CPU = "cpu"
    DISK = "disk"


class LogLevel(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


BATCHING, LOADING, SERVER = "Continuous batching", "Loading", "Server"


def serve_command(
    folder: Annotated[Path, typer.Argument(help="A converted folder with a tokenizer.", exists=True, file_okay=False)],
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file that writes a chat as a prompt.", exists=True, dir_okay=False)
    ] = None,
    continuous_batching: Annotated[
        bool, typer.Option("--continuous-batching", help="Batch requests; else one after the other.")
    ] = False,
    cb_block_size: Annotated[
        int | None, typer.Option(min=4, help="Tokens a cache block.", rich_help_panel=BATCHING)
    ] = None,
    cb_num_blocks: Annotated[
        int | None, typer.Option(min=1, help="Cache blocks; else by free memory.", rich_help_panel=BATCHING)
    ] = None,
    cb_max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens a forward pass; else by free memory.", rich_help_panel=BATCHING)
    ] = None,
    cb_max_memory_percent: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of free memory to use.", rich_help_panel=BATCHING)
    ] = None,
    cb_use_cuda_graph: Annotated[
        bool | None,
        typer.Option("--cb-use-cuda-graph/--no-cb-use-cuda-graph", help="CUDA graphs.", rich_help_panel=BATCHING),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32, or auto (as stored).", rich_help_panel=LOADING)
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Where the layers go: auto, cpu, cuda:0, ...", rich_help_panel=LOADING)
    ] = "auto",
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="int8 is xAI's own; an int8 folder needs no flag.", rich_help_panel=LOADING),
    ] = None,
    experts_on: Annotated[
        ExpertsOn | None,
        typer.Option(help="Keep the experts there and read the chosen ones.", rich_help_panel=LOADING),
    ] = None,
    expert_cache: Annotated[
        str | None,
        typer.Option(help="Recent experts on the device, such as 40GB.", rich_help_panel=LOADING),
    ] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="eager, flash_attention_2, flex_attention, ...", rich_help_panel=LOADING)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER)] = "localhost",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", rich_help_panel=SERVER)
    ] = 8000,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let web pages of any origin ask.", rich_help_panel=SERVER)
    ] = False,
    log_level: Annotated[
        LogLevel, typer.Option(help="What the server prints; info has a line a request.", rich_help_panel=SERVER)
    ] = LogLevel.WARNING,
) -> None:
    """Answer OpenAI's API: completions, streaming, and chat with a template of your choice."""
    from rich.console import Console
    from transformers.utils.import_utils import is_serve_available

    from grok1.errors import ConversionError

    if not is_serve_available():
        raise ImportError("The server needs FastAPI, Uvicorn and openai: `pip install 'modeling-grok1[serve]'`.")

    from transformers.utils import logging

    from grok1.serving.server import FolderManager, batching_config, build_app, listen, run

    sizes: dict[str, Any] = {
        "page_size": cb_block_size,
        "num_blocks": cb_num_blocks,
        "max_batch_tokens": cb_max_batch_tokens,
        "max_memory_percent": cb_max_memory_percent,
        "use_cuda_graph": cb_use_cuda_graph,
    }
    sizes = {name: value for name, value in sizes.items() if value is not None}
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    problems = [f"{folder / name}: not there" for name in missing]
    if sizes and not continuous_batching:
        problems.append("--cb-...: has no effect without --continuous-batching")
    if problems:
        raise ConversionError("Cannot serve.", problems, "`grok1 convert CKPT OUT` makes a folder.")

    logging.set_verbosity(logging.log_levels[log_level])
    try:
        bound = listen(host, port)  # before minutes of loading
    except OSError as error:
        raise ConversionError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.", next_step="Choose another --port or --host."
        ) from None
    manager = FolderManager(
        folder,
        chat_template=chat_template,
        quantization=quantization,
        model_kwargs={
            name: value
            for name, value in (("experts_on", experts_on), ("expert_cache", expert_cache))
            if value is not None
        },
        device=device,
        dtype=dtype,
        attn_implementation=attn_implementation,
        continuous_batching=continuous_batching,
    )
    batching = batching_config(manager.model, **sizes) if continuous_batching else None
    app = build_app(manager, batching=batching, enable_cors=enable_cors)
    bound.listen()
    address = f"http://{host}:{bound.getsockname()[1]}"
    Console(highlight=False).print(f"Serving {manager.name} at {address}/v1", soft_wrap=True)
    run(app, bound, log_level=log_level)
