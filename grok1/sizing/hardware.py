"""Hardware: the cards and Macs that are sold, what of their memory is usable, and how fast it is read.

Sizes and bandwidths are the manufacturers' published figures, collected in November 2026. Bandwidth is the peak of the
data sheet, so a speed computed from it is an upper bound.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A GPU as sold.

    Args:
        name: as written in `--gpus`.
        sold: the number of GB in its name.
        usable: bytes that PyTorch reports as `total_memory`, rounded down to 0.1 GiB.
        bandwidth: bytes/s of its memory.
        link: bytes/s of its connection to the host, one direction.
    """

    name: str
    sold: int
    usable: int
    bandwidth: int
    link: int


def _card(name: str, sold: int, gib: float, bandwidth: int, link: int) -> Card:
    return Card(name, sold, int(gib * GIB), bandwidth * GB, link * GB)


# name, GB as sold, usable GiB, GB/s of memory, GB/s of PCIe (x16: 32 for generation 4, 64 for generation 5)
CARDS = {
    card.name: card
    for card in (
        _card("RTX3090", 24, 23.5, 936, 32),
        _card("RTX4090", 24, 23.5, 1008, 32),
        _card("RTX5090", 32, 31.3, 1792, 64),
        _card("RTXA6000", 48, 47.4, 768, 32),
        _card("RTXPRO6000", 96, 94.9, 1792, 64),
        _card("L4", 24, 22.0, 300, 32),
        _card("L40S", 48, 44.3, 864, 32),
        _card("A100-40", 40, 39.3, 1555, 32),
        _card("A100-80", 80, 79.1, 1935, 32),
        _card("H100", 80, 79.1, 3350, 64),
        _card("H200", 141, 139.7, 4800, 64),
        _card("B200", 180, 178.3, 8000, 64),
        _card("MI300X", 192, 191.9, 5300, 64),
        _card("MI325X", 256, 255.9, 6000, 64),
    )
}
ALIASES = {"3090": "RTX3090", "4090": "RTX4090", "5090": "RTX5090", "A6000": "RTXA6000", "A100": "A100-80"}


def card_of_size(gigabytes: float) -> Card | None:
    """The card that "80GB" stands for: the least usable memory of the cards sold with that size, then the slowest."""
    same = [card for card in CARDS.values() if card.sold == gigabytes]
    return min(same, key=lambda card: (card.usable, card.bandwidth), default=None)


@dataclass(frozen=True)
class Gpus:
    """`nodes` machines with `per_node` GPUs each, of `memory` usable bytes each.

    Args:
        card: what they are; None where only a number of bytes is given, whose speed is unknown.
    """

    nodes: int
    per_node: int
    memory: int
    card: Card | None = None

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @classmethod
    def parse(cls, text: str) -> Gpus:
        """Read GPUs from the command line.

        "8xH100" names the card; "8x80GB" is eight cards sold as 80 GB; "24GB" is one card; "2x8x80GB" is two machines.
        "4x24GiB" and "4x25769803776B" are exact.

        Raises:
            ValueError: neither a known card nor a size.
        """
        match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([^x\s]+(?:\s*[gG][iI]?[bB])?)", text.strip(), re.IGNORECASE)
        nodes, per_node = (int(match[1] or 1), int(match[2] or 1)) if match else (0, 0)
        if match is None or nodes * per_node == 0:
            raise ValueError(_not_hardware(text))
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|B)", match[3], re.IGNORECASE)
        if size is None:
            name = match[3].upper().replace("_", "-")
            name = ALIASES.get(name, name)
            if name not in CARDS:
                raise ValueError(_not_hardware(text))
            return cls(nodes, per_node, CARDS[name].usable, CARDS[name])
        number, unit = float(size[1]), size[2].lower()
        card = card_of_size(number) if unit == "gb" else None
        if card is not None:
            return cls(nodes, per_node, card.usable, card)
        return cls(nodes, per_node, int(number * {"gb": GB, "gib": GIB, "b": 1}[unit]))

    def __str__(self) -> str:
        machines = f"{self.nodes} machines, each " if self.nodes > 1 else ""
        name = f"{self.card.name} " if self.card is not None else ""
        return f"{machines}{self.per_node} x {name}({self.memory / GB:.1f} GB usable)"


def _not_hardware(text: str) -> str:
    return (
        f"`--gpus`: expected GPUs as in 8xH100, 8x80GB, 24GB, 4x24GiB or 2x8x80GB (two machines), found {text!r}. "
        f"Known cards: {', '.join(CARDS)}."
    )


@dataclass(frozen=True)
class Mac:
    """A Mac as sold, by Apple's technical specifications: GB of unified memory, bytes/s of its bandwidth."""

    name: str
    memory: int
    bandwidth: int


# The configurations of Apple's 2025 Macs with 64 GB and more. By size, for `--mac`; the fastest of each.
MACS = {
    mac.memory // GB: mac
    for mac in (
        Mac("Mac mini, M4 Pro", 64 * GB, 273 * GB),
        Mac("Mac Studio, M3 Ultra", 96 * GB, 819 * GB),
        Mac("Mac Studio or MacBook Pro, M4 Max", 128 * GB, 546 * GB),
        Mac("Mac Studio, M3 Ultra", 256 * GB, 819 * GB),
        Mac("Mac Studio, M3 Ultra", 512 * GB, 819 * GB),
    )
}
# macOS lets the GPU use about three quarters of the memory unless `iogpu.wired_limit_mb` is raised.
MAC_SHARE = 0.75


def parse_macs(text: str) -> tuple[int, Mac]:
    """Read "512" (one Mac of 512 GB) or "2x256" from the command line. Raises ValueError for another size."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)(?:\s*GB)?", text.strip(), re.IGNORECASE)
    if match is None or int(match[1] or 1) == 0 or int(match[2]) not in MACS:
        sizes = ", ".join(map(str, MACS))
        raise ValueError(f"`--mac`: expected gigabytes, {sizes}, or several Macs as in 2x256, found {text!r}.")
    return int(match[1] or 1), MACS[int(match[2])]
