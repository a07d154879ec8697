"""Hardware as it is written on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass


GB = 10**9


@dataclass(frozen=True)
class Gpus:
    """`nodes` machines with `per_node` GPUs each, of `memory` bytes each."""

    nodes: int
    per_node: int
    memory: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Read "8x80GB", "24GB", or with the number of machines first, "2x8x80GB". Raises ValueError."""
        match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(\d+(?:\.\d+)?)\s*(GB|GiB)", text.strip(), re.IGNORECASE)
        if match is None or int(match[1] or 1) * int(match[2] or 1) == 0:
            raise ValueError(f"`--gpus`: expected GPUs as in 8x80GB, 24GB or 2x8x80GB (two machines), found {text!r}.")
        unit = 2**30 if match[4].lower() == "gib" else GB
        return cls(nodes=int(match[1] or 1), per_node=int(match[2] or 1), memory=int(float(match[3]) * unit))

    def __str__(self) -> str:
        machines = f"{self.nodes} machines, each " if self.nodes > 1 else ""
        return f"{machines}{self.per_node} x {self.memory / GB:.0f} GB"
