"""`grok1 serve`: a converted folder behind OpenAI's API."""

from __future__ import annotations

from typing import Any

from grok1.cli import serve_options as option
from grok1.cli.options import AttnImplementation, ConvertedFolder, DeviceMap, ExpertCache, ExpertsOn, LoadingPrecision


EXAMPLES = """
grok1 serve grok-1-hf
grok1 serve grok-1-hf --continuous-batching --port 8080
grok1 serve grok-1-hf --chat-template chat.jinja --precision int8
"""


def serve_command(
    folder: ConvertedFolder,
    chat_template: option.ChatTemplate = None,
    continuous_batching: option.ContinuousBatching = False,
    cb_block_size: option.BlockSize = None,
    cb_num_blocks: option.NumBlocks = None,
    cb_max_batch_tokens: option.MaxBatchTokens = None,
    cb_max_memory_percent: option.MaxMemoryPercent = None,
    cb_use_cuda_graph: option.UseCudaGraph = None,
    precision: LoadingPrecision = "auto",
    device_map: DeviceMap = "auto",
    experts_on: ExpertsOn = None,
    expert_cache: ExpertCache = None,
    attn_implementation: AttnImplementation = None,
    host: option.Host = "localhost",
    port: option.Port = 8000,
    served_model_name: option.ServedModelName = None,
    allowed_host: option.AllowedHosts = None,
    api_key: option.ApiKey = None,
    max_body: option.MaxBody = "4MB",
    max_waiting: option.MaxWaiting = 256,
    enable_cors: option.EnableCors = False,
    log_level: option.LogLevelOption = option.LogLevel.WARNING,
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
        name=served_model_name,
        hosts=(host, *(allowed_host or ())),
        api_key=api_key,
        max_body=max_body,
        max_waiting=max_waiting,
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
