"""What a part of benchmarks/gpu.py knows of its run, and how it records results: each one the moment it exists."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .models import Sizes


class NotHereError(Exception):
    """A check cannot run on this machine; the message is the reason."""


@dataclass
class Run:
    """
    One part in one worker.

    Args:
        device: where models are built.
        sizes: of the models and inputs, true or tiny.
        write: takes a result, a dictionary that JSON can hold.
        known: values of earlier parts, by name: the rates of the card.
        deadline: of this part, by `time.monotonic()`.
    """

    device: torch.device
    sizes: Sizes
    write: Callable[[dict[str, Any]], None]
    known: dict[str, float]
    deadline: float

    @property
    def dry(self) -> bool:
        return self.sizes.dry

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def holds(self, name: str, condition: bool, detail: str) -> None:
        self.write({"name": name, "status": "ok" if condition else "FAILED", "detail": detail})

    def value(self, name: str, value: float, unit: str, detail: str = "", **more: Any) -> None:
        self.write({"name": name, "status": "measured", "value": value, "unit": unit, "detail": detail, **more})

    def absent(self, name: str, reason: object) -> None:
        self.write({"name": name, "status": "not here", "detail": f"not here: {reason}"})

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """A check whose failure is a result, and leaves the other checks of the part to run."""
        try:
            yield
        except NotHereError as reason:
            self.absent(name, reason)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error)[:500]} ({where.filename.rpartition('/')[2]}:{where.lineno})"
            self.write({"name": name, "status": "FAILED", "detail": text})
        self.free()

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> float:
        """Seconds of one call, of `repeats` calls queued one after the other."""
        repeats, warmup = (1, 1) if self.dry else (repeats, warmup)
        for _ in range(warmup):
            function()
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            function()
        self.synchronize()
        return (time.perf_counter() - begin) / repeats
