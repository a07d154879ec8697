"""Streamers whose output is exactly the decoded text.

Those of Transformers forget their tokens after a newline, and decoding drops one space at the beginning
(SentencePiece's dummy prefix): they lose the first space of every indented line. These remember what the last line
ended with.
"""

from __future__ import annotations

import torch
from transformers import TextIteratorStreamer, TextStreamer


class _RemembersLineEnd(TextStreamer):
    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if not self.token_cache:  # flushed after a newline, or the prompt was skipped
            self.token_cache = value.flatten().tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))


class LineTextStreamer(_RemembersLineEnd):
    """`transformers.TextStreamer`, printing `decode(prompt + generated)`, or with `skip_prompt` what it adds to
    `decode(prompt)`."""


class LineTextIteratorStreamer(_RemembersLineEnd, TextIteratorStreamer):
    """`transformers.TextIteratorStreamer`, giving the same text as `LineTextStreamer` prints."""
