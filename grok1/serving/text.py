"""Tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """The text of a choice while it is generated.

    Args:
        tokenizer: made for continuations, so that the text begins with its space.
        stops: strings that end it. They are not in the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, stops
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._pending: list[int] = []  # tokens that are not decoded yet: an unfinished character
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token makes certain of the text, often nothing or more than its own piece."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # bytes that are no UTF-8: the decoder reads the bytes before them, already given, otherwise
            self._stream = DecodeStream([], skip_special_tokens=True)
            piece = self._tokenizer.decode(self._pending, skip_special_tokens=True)
        if piece is None or self.stopped:
            return ""
        self._pending = []
        self._held += piece
        return self._release()

    def finish(self) -> str:
        """The rest, with an unfinished character as U+FFFD."""
        if self.stopped:
            return ""
        self._held += self._tokenizer.decode(self._pending, skip_special_tokens=True)
        certain = self._release()
        rest, self._held = self._held, ""
        return certain if self.stopped else certain + rest

    def _release(self) -> str:
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        held = max((overlap(self._held, stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - held]
        self._held = self._held[len(self._held) - held :]
        return certain


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: Any, token: int) -> str:
    """A token as log-probabilities show it; a byte that is no character as `bytes:\\xNN`, as OpenAI does."""
    text: str = tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" in text:
        piece = tokenizer.convert_ids_to_tokens(token)
        if piece.startswith("<0x"):
            return f"bytes:\\x{piece[3:5].lower()}"
    return text
