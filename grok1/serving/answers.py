"""Choices in OpenAI's format, whole and as the chunks of a stream."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grok1.serving.generation import Token
from grok1.serving.text import token_text


# JSON has no infinity; OpenAI's and vLLM's servers send this.
LEAST_LOGPROB = -9999.0


@dataclass
class Piece:
    """A part of a choice: its text, the tokens behind it, and at the end the reason ("stop", "length")."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.finish_reason = other.finish_reason or self.finish_reason


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def described(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


class Completions:
    """The format of /v1/completions.

    Args:
        name: of the model.
        tokenizer: for the texts of log-probabilities.
        alternatives: log-probabilities are in the answer, with as many alternatives; None: they are not.
    """

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, name: str, tokenizer: Any, alternatives: int | None):
        self.name, self.tokenizer, self.alternatives = name, tokenizer, alternatives
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self._offsets: dict[int, int] = {}

    def body(self, choices: list[dict[str, Any]], kind: str, usage: Usage | None) -> dict[str, Any]:
        body = {"id": self.id, "object": kind, "created": self.created, "model": self.name, "choices": choices}
        return body if usage is None else {**body, "usage": usage.described()}

    def answer(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return self.body([self.choice(index, piece) for index, piece in enumerate(pieces)], self.whole, usage)

    def event(self, index: int, piece: Piece) -> str:
        """A chunk of a stream."""
        return sse(self.body([self.delta(index, piece)], self.chunk, None))

    def last_event(self, usage: Usage) -> str:
        """The chunk with the usage, which has no choices."""
        return sse(self.body([], self.chunk, usage))

    def opening(self, index: int) -> str:
        """What a stream begins with for a choice."""
        return ""

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        choice = {"index": index, "text": piece.text, "finish_reason": piece.finish_reason}
        return {**choice, "logprobs": None if self.alternatives is None else self.logprobs(index, piece)}

    delta = choice

    def logprobs(self, index: int, piece: Piece) -> dict[str, list[Any]]:
        texts = [token_text(self.tokenizer, token.id) for token in piece.tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(token.logprob) for token in piece.tokens],
            "top_logprobs": [self._likely(token, text) for token, text in zip(piece.tokens, texts, strict=True)],
            "text_offset": offsets,
        }

    def _likely(self, token: Token, text: str) -> dict[str, float | None] | None:
        """The alternatives by text, most likely first, and the token itself. Of one text the likeliest counts."""
        if token.logprob is None:
            return None
        likely: dict[str, float | None] = {}
        for other, logprob in token.likely:
            likely.setdefault(token_text(self.tokenizer, other), finite(logprob))
        likely.setdefault(text, finite(token.logprob))
        return likely


class Chats(Completions):
    """The format of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> str:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return sse(self.body([choice], self.chunk, None))

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text}
        return {**self._about(index, piece), "message": message}

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        return {**self._about(index, piece), "delta": {"content": piece.text} if piece.text else {}}

    def _about(self, index: int, piece: Piece) -> dict[str, Any]:
        about: dict[str, Any] = {"index": index, "finish_reason": piece.finish_reason, "logprobs": None}
        if self.alternatives is not None:
            content = [
                {
                    **self._scored(token.id, token.logprob),
                    "top_logprobs": [self._scored(*pair) for pair in token.likely],
                }
                for token in piece.tokens
            ]
            about["logprobs"] = {"content": content, "refusal": None}
        return about

    def _scored(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        data = bytes([int(text[-2:], 16)]) if text.startswith("bytes:\\x") else text.encode()
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


def sse(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"
