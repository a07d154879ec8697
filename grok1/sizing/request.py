"""What `grok1 plan` is asked: a model, hardware, a precision, and how much text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grok1.precision import Precision, find_precision
from grok1.sizing.hardware import Gpus


if TYPE_CHECKING:
    from modeling_grok1 import GrokConfig

PARALLEL = ("auto", "tp", "ep", "pp")


@dataclass(frozen=True)
class Request:
    """
    Args:
        config: the model's sizes.
        gpus: the hardware.
        precision: key of `grok1.precision.PRECISIONS`.
        context: tokens of a sequence, prompt and generated tokens together.
        batch: sequences at a time.
        parallel: one of `PARALLEL`.
        chunk: tokens of the prompt that are processed at a time (`prefill_chunk_size` of `generate`).
        folders: the folder that a command in a precision names.
        host_memory: bytes of host memory in which experts may stay; 0: none.
        disk: bytes/s at which the disk is read.
    """

    config: GrokConfig
    gpus: Gpus
    precision: str = "bfloat16"
    context: int = 8192
    batch: int = 1
    parallel: str = "auto"
    chunk: int = 512
    folders: Callable[[str], str] = lambda precision: "grok-1-hf"
    host_memory: int = 0
    disk: int = 7 * 10**9

    @property
    def folder(self) -> str:
        """The folder for the command."""
        return self.folders(self.precision)

    @property
    def row(self) -> Precision:
        """The precision's row in the registry."""
        return find_precision(self.precision)

    def check(self) -> None:
        """Raise one ValueError that lists everything that is out of range."""
        problems = []
        try:
            find_precision(self.precision)
        except ValueError as error:
            problems.append(str(error).rstrip("."))
        if self.parallel not in PARALLEL:
            problems.append(f"`parallel`: expected one of {', '.join(PARALLEL)}, found {self.parallel!r}")
        if not 1 <= self.context <= self.config.max_position_embeddings:
            longest = self.config.max_position_embeddings
            problems.append(f"`context`: expected 1 to {longest} tokens, found {self.context}")
        problems += [
            f"`{name}`: expected at least 1, found {value}"
            for name, value in (("batch", self.batch), ("chunk", self.chunk))
            if value < 1
        ]
        if problems:
            raise ValueError("; ".join(problems) + ".")
