"""HTTP: what is checked before a route, errors in OpenAI's format, and clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import logging
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import pydantic_core
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grok1.serving.generation import UnavailableError


RETRY_AFTER = 5  # seconds
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Args:
        hosts: the names that the Host header may have, beside the loopback names; "*" is any.
        api_key: clients must send it as `Authorization: Bearer KEY`; None: no key.
        max_body: bytes of a request at most.
        max_waiting: choices that are generated or wait for it, of all requests together.
    """

    hosts: tuple[str, ...] = ()
    api_key: str | None = None
    max_body: int = 4 * 2**20
    max_waiting: int = 256


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def described(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format, whose message its clients show."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def refusal(status: int, message: str, param: str | None = None, headers: Any = None) -> JSONResponse:
    return JSONResponse(described(status, message, param), status, headers=headers)


def wrong_fields(error: ValidationError) -> tuple[str, str | None]:
    """One sentence for everything that is wrong with a request, and the first field's name."""
    sentences: list[str] = []
    first = None
    for found in error.errors(include_url=False, include_context=False)[:20]:
        place = ".".join(str(part) for part in found["loc"] if not str(part).startswith("function-"))[:200]
        first = first or (str(found["loc"][0]) if found["loc"] else None)
        said = found["msg"].removeprefix("Value error, ")
        said = {"extra_forbidden": "not a parameter of this server", "missing": "expected, but not there"}.get(
            found["type"], said
        )
        value = repr(found["input"]) if not isinstance(found["input"], dict | list) else type(found["input"]).__name__
        shown = "" if found["type"] in ("extra_forbidden", "missing", "value_error") else f", found {value[:80]}"
        sentences.append(f"{place}: {said}{shown}" if place else said)
    return "; ".join(dict.fromkeys(sentences)), first


def message_of(error: Exception) -> tuple[int, str]:
    """Status and message of an error while a request is served."""
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail)
    if isinstance(error, UnavailableError):
        return 503, str(error)
    logger.error("A request failed.", exc_info=error)
    return 500, f"Generation failed: {error}" if isinstance(error, RuntimeError) else "Generation failed."


async def on_error(_: HTTPRequest, error: Exception) -> Response:
    status, message = message_of(error)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:
        headers.setdefault("Retry-After", str(RETRY_AFTER))
    return refusal(status, message, headers=headers)


async def on_client_left(_: HTTPRequest, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def on_wrong_fields(_: HTTPRequest, error: Any) -> Response:
    return refusal(400, *wrong_fields(error))


# ---------------------------------------------------------------------------------------------------------------------
# Before a route


class Guard:
    """Checks the Host header and the key, and answers with an X-Request-ID: the client's, or a new one."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits
        self.hosts = {*LOOPBACK, *limits.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        echoed = given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", echoed.encode())]
            await send(message)

        refused = self.refused(scope, headers)
        await (refused or self.app)(scope, receive, send_with_id)

    def refused(self, scope: Scope, headers: dict[str, str]) -> JSONResponse | None:
        host = headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if "*" not in self.hosts and name.lower() not in self.hosts:
            return refusal(
                403,
                f"Host: expected one of {', '.join(sorted(self.hosts))}, found {name!r}. --allowed-host adds a name.",
            )
        if self.limits.api_key is not None and scope["path"] != "/health" and scope["method"] != "OPTIONS":
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(
                key.encode("latin-1"), self.limits.api_key.encode()
            ):
                return refusal(401, "Authorization: expected `Bearer KEY` with the key of this server.")
        return None


async def json_body(request: HTTPRequest, limit: int) -> Any:
    """The body as JSON. Raises HTTPException: too large, or something else than a JSON object."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"Content-Type: expected application/json, found {kind or 'none'}.")
    too_large = HTTPException(
        413, f"The request is larger than {limit:,} bytes. --max-body of the server sets the limit."
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > limit:
            raise too_large
    try:
        found = pydantic_core.from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"The request is not a JSON object: {error}.") from None
    if not isinstance(found, dict):
        raise HTTPException(400, "The request is not a JSON object: expected {...}.")
    return found


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, which is cancelled when the client leaves: ClientDisconnect. The body has been read."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. `events` are closed when the client leaves; `done` is called at the end in any case."""

    media_type = "text/event-stream"

    def __init__(self, events: Any, done: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        self.events, self.done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with aclosing(self.events):
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            with suppress(ClientDisconnect, OSError):
                await while_connected(receive, body())
        finally:
            self.done()
