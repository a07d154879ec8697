"""Transformers' OpenAI-compatible server for one folder with Grok-1.

Routes, handlers and generation are those of `transformers serve`. The differences:

- one model, under its folder's name or path; any other name is refused and nothing is ever downloaded
- a prompt beyond the context is refused, and a completion ends with the context
- a chat without a chat template is refused: Grok-1 is a base model
- a completion is decoded as the continuation of its prompt and keeps its leading space
- a temperature above 0 samples, with parameters per request under continuous batching too
- a parameter that the server would ignore is refused
"""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import ContinuousBatchingConfig
from transformers.cli.serving.server import build_server

from grok1.serving.generation import ServerState
from grok1.serving.handlers import ChatCompletions, Completions, Responses, SystemOne, Transcriptions
from grok1.serving.model import FolderManager


GRACE = 5  # seconds for clients to receive the end of their responses


def refusal(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's format, whose message its clients show."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def not_json(error: RequestValidationError) -> str:
    return f"The request is not a JSON object: {error.errors()[0]['msg']}."


def build_app(
    manager: FolderManager,
    *,
    batching: ContinuousBatchingConfig | None = None,
    enable_cors: bool = False,
) -> FastAPI:
    """Transformers' application around `manager`, for `Server`.

    Args:
        batching: from `batching_config`, to batch the requests; else they are served one at a time.
    """
    state = ServerState(continuous_batching=batching is not None, cb_config=batching)
    if batching is None:
        manager.model.register_forward_pre_hook(state.check_running)
    app = build_server(
        manager,
        ChatCompletions(manager, state),
        completion_handler=Completions(manager, state),
        response_handler=Responses(manager, state),
        transcription_handler=Transcriptions(manager, state),
        systemone_handler=SystemOne(manager, state),
        generation_state=state,
        enable_cors=enable_cors,
    )
    app.state.manager, app.state.generation = manager, state

    app.add_exception_handler(HTTPException, lambda _, error: refusal(error.status_code, str(error.detail)))
    app.add_exception_handler(RequestValidationError, lambda _, error: refusal(400, not_json(error)))
    for kind in (ValueError, TemplateError):  # raised by `generate` and by the chat template
        app.add_exception_handler(kind, lambda _, error: refusal(400, str(error)))
    return app


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises OSError with the reason: taken, not allowed, no such host."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class Server(uvicorn.Server):
    """Uvicorn with the application of `build_app`; at shutdown running requests are aborted."""

    def __init__(self, app: FastAPI, **options: Any):
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=GRACE, **options))
        self.generation: ServerState = app.state.generation

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.generation.shutdown)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket, *, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM."""
    # After its graceful shutdown uvicorn raises the signal again, for the handlers that it replaced.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(app, log_level=log_level).run(sockets=[bound])
