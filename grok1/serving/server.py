"""An OpenAI-compatible application for one folder with Grok-1: its routes, limits and errors.

Routes: POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /v1/models/NAME, GET /health, and
POST /load_model, with which `transformers chat` asks whether the model is there. Nothing else, and nothing loads a
model or downloads.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import ContinuousBatchingConfig

from grok1.serving.answers import Chats, Completions, Piece, Usage, sse
from grok1.serving.batching import Batched
from grok1.serving.generation import Engine, Job, Sequential, UnavailableError
from grok1.serving.handlers import Handler, merged
from grok1.serving.http import (
    RETRY_AFTER,
    EventStream,
    Guard,
    Limits,
    described,
    json_body,
    message_of,
    on_client_left,
    on_error,
    on_wrong_fields,
    while_connected,
)
from grok1.serving.model import ServedModel
from grok1.serving.schema import ChatRequest, CompletionRequest


GRACE = 5  # seconds for clients to receive the end of their responses


# ---------------------------------------------------------------------------------------------------------------------
# Routes


class Routes:
    """The routes, and how many choices are under way."""

    def __init__(self, served: ServedModel, engine: Engine, limits: Limits):
        self.served, self.engine, self.limits = served, engine, limits
        self.handler = Handler(served, engine)
        self.under_way = 0

    def enter(self, choices: int) -> Callable[[], None]:
        """Count choices until the returned function is called. Raises HTTPException where there are too many."""
        if self.under_way and self.under_way + choices > self.limits.max_waiting:
            raise HTTPException(
                429,
                f"The server is busy: {self.under_way} choices are generated or wait, at most "
                f"{self.limits.max_waiting} may. Try again later.",
                {"Retry-After": str(RETRY_AFTER)},
            )
        self.under_way += choices

        def leave() -> None:
            self.under_way -= choices

        return leave

    def check_model(self, name: Any) -> None:
        if not self.served.answers_to(name):
            raise HTTPException(
                404, f"This server has one model, {self.served.name!r}; found {name!r} in the request."
            )

    async def completions(self, http: HTTPRequest) -> Response:
        return await self._generate(http, CompletionRequest, Completions)

    async def chats(self, http: HTTPRequest) -> Response:
        return await self._generate(http, ChatRequest, Chats)

    async def _generate(
        self, http: HTTPRequest, kind: type[CompletionRequest | ChatRequest], form: type[Completions]
    ) -> Response:
        request = kind.model_validate(await json_body(http, self.limits.max_body))
        self.check_model(request.model)
        prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        leave, streaming = self.enter(prompts * (request.n or 1)), False
        try:
            jobs = await while_connected(http.receive, self.handler.jobs(request))
            answer = form(self.served.name, self.served.tokenizer, request.alternatives)
            if request.stream:
                streaming = True
                return EventStream(self._events(request, jobs, answer), leave)
            return JSONResponse(await while_connected(http.receive, self._whole(request, jobs, answer)))
        finally:
            if not streaming:
                leave()

    async def _whole(self, request: Any, jobs: list[Job], answer: Completions) -> dict[str, Any]:
        pieces, tokens = [Piece() for _ in jobs], 0
        async with aclosing(merged([self.handler.choice(job, request) for job in jobs])) as parts:  # type: ignore[type-var]
            async for index, piece in parts:
                pieces[index].add(piece)
                tokens += len(piece.tokens)
        return answer.answer(pieces, usage(jobs, tokens))

    async def _events(self, request: Any, jobs: list[Job], answer: Completions) -> AsyncIterator[str]:
        tokens = 0
        try:
            for index in range(len(jobs)):
                if opening := answer.opening(index):
                    yield opening
            async with aclosing(merged([self.handler.choice(job, request) for job in jobs])) as parts:  # type: ignore[type-var]
                async for index, piece in parts:
                    tokens += len(piece.tokens)
                    if piece.text or piece.finish_reason or (piece.tokens and request.alternatives is not None):
                        yield answer.event(index, piece)
        except Exception as error:
            yield sse(described(*message_of(error)))
            return
        if request.stream_options is not None and request.stream_options.include_usage:
            yield answer.last_event(usage(jobs, tokens))
        yield "data: [DONE]\n\n"

    async def models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self.served.described()]})

    async def model(self, http: HTTPRequest) -> Response:
        self.check_model(http.path_params["name"])
        return JSONResponse(self.served.described())

    async def load_model(self, http: HTTPRequest) -> Response:
        body = await json_body(http, self.limits.max_body)
        if not isinstance(body.get("model"), str):
            raise HTTPException(400, "model: expected the name of the model.")
        self.check_model(body["model"])
        ready = {"status": "ready", "model": self.served.name, "cached": True}
        return Response(f"data: {json.dumps(ready)}\n\n", media_type="text/event-stream")

    async def health(self, _: HTTPRequest) -> Response:
        serves, about = self.engine.health()
        return JSONResponse({"status": "ok" if serves else "unhealthy", **about}, 200 if serves else 503)

    def listed(self) -> list[Route]:
        return [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chats, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/load_model", self.load_model, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
        ]


def usage(jobs: list[Job], tokens: int) -> Usage:
    """Each prompt counts once, however many choices it has; echoed tokens are the prompt's."""
    prompts = {id(job.prompt): len(job.prompt) for job in jobs}
    return Usage(sum(prompts.values()), tokens - sum(len(job.prompt) for job in jobs if job.echo))


# ---------------------------------------------------------------------------------------------------------------------
# The application and its server


def build_app(
    served: ServedModel,
    *,
    batching: ContinuousBatchingConfig | None = None,
    limits: Limits | None = None,
    enable_cors: bool = False,
) -> Starlette:
    """The application, for `Server`.

    Args:
        batching: from `batching_config`, to batch the requests; else they are served one at a time.
        limits: what is accepted; default: `Limits()`.
        enable_cors: allow requests from web pages of any origin.
    """
    limits = limits or Limits()
    engine: Any = Sequential(served.model) if batching is None else Batched(served.model, batching)
    routes = Routes(served, engine, limits)
    middleware = [Middleware(Guard, limits=limits)]
    if enable_cors:
        middleware.append(Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]))
    app = Starlette(
        routes=routes.listed(),
        middleware=middleware,
        exception_handlers={
            HTTPException: on_error,
            UnavailableError: on_error,
            RuntimeError: on_error,
            ValidationError: on_wrong_fields,
            ClientDisconnect: on_client_left,
            Exception: on_error,
        },
    )
    app.state.served, app.state.engine, app.state.routes = served, engine, routes
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

    def __init__(self, app: Starlette, **options: Any):
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=GRACE, **options))
        self.engine: Engine = app.state.engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self.engine.stop)
        await super().shutdown(sockets)


def run(app: Starlette, bound: socket.socket, *, log_level: str = "warning") -> None:
    """Serve until SIGINT or SIGTERM."""
    # After its graceful shutdown uvicorn raises the signal again, for the handlers that it replaced.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    Server(app, log_level=log_level).run(sockets=[bound])
