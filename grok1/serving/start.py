"""Start the server: check the settings, load the model, serve until interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grok1.errors import ConversionError
from grok1.loading import check_device_map, check_folder
from modeling_grok1.sizes_grok1 import parse_size


@dataclass(frozen=True)
class Settings:
    """
    Args:
        folder: a converted folder with a tokenizer.
        chat_template: a Jinja file, or None.
        precision: as in `grok1.precision.loading_options`.
        model_kwargs: for `from_pretrained`, such as `experts_on`.
        device_map: as in `from_pretrained`.
        attn_implementation: as in `from_pretrained`.
        continuous_batching: batch requests.
        sizes: for `batching_config`.
        name: of the model, for clients; None: the folder's.
        hosts: further names of the Host header, as in `grok1.serving.http.Limits`; so are the next three.
        api_key: clients must send it.
        max_body: largest request, such as "4MB".
        max_waiting: choices under way.
        enable_cors: allow requests from web pages of any origin.
        log_level: error, warning, info or debug.
    """

    folder: Path
    chat_template: Path | None = None
    precision: str = "auto"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    device_map: str = "auto"
    attn_implementation: str | None = None
    continuous_batching: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    name: str | None = None
    hosts: tuple[str, ...] = ()
    api_key: str | None = None
    max_body: str = "4MB"
    max_waiting: int = 256
    enable_cors: bool = False
    log_level: str = "warning"


def check_settings(settings: Settings) -> None:
    """Raise ImportError without the extra `serve`, or ConversionError with all that is wrong with the settings."""
    missing = [name for name in ("starlette", "uvicorn", "pydantic") if find_spec(name) is None]
    if missing:
        raise ImportError(f"The server needs {', '.join(missing)}: `pip install 'modeling-grok1[serve]'`.")
    problems = []
    if settings.sizes and not settings.continuous_batching:
        problems.append("--cb-...: has no effect without --continuous-batching")
    try:
        parse_size(settings.max_body, "--max-body")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ConversionError("Cannot serve.", problems)
    check_folder(settings.folder)
    check_device_map(settings.device_map)


def listen_on(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConversionError with the reason where it cannot be had."""
    from grok1.serving.server import listen

    try:
        return listen(host, port)
    except OSError as error:
        raise ConversionError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}.", next_step="Choose another --port or --host."
        ) from None


def start(settings: Settings, bound: socket.socket, ready: Callable[[str], None]) -> None:
    """Load the model, call `ready` with its name once requests are accepted, and serve until SIGINT or SIGTERM."""
    from transformers.utils import logging

    from grok1.serving import server
    from grok1.serving.batching import batching_config
    from grok1.serving.http import Limits
    from grok1.serving.model import ServedModel

    logging.set_verbosity(logging.log_levels[settings.log_level])
    served = ServedModel(
        settings.folder,
        name=settings.name,
        chat_template=settings.chat_template,
        precision=settings.precision,
        device_map=settings.device_map,
        attn_implementation=settings.attn_implementation,
        **settings.model_kwargs,
    )
    batching = batching_config(served.model, **settings.sizes) if settings.continuous_batching else None
    max_body = parse_size(settings.max_body, "max_body")
    limits = Limits(settings.hosts, settings.api_key, max_body, settings.max_waiting)
    app = server.build_app(served, batching=batching, limits=limits, enable_cors=settings.enable_cors)
    bound.listen()
    ready(served.name)
    server.run(app, bound, log_level=settings.log_level)
