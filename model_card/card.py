"""The README.md of a converted folder: a template, filled with what was measured in the folder.

Nothing is dated, and no sentence depends on where the folder came from: the same facts always give the same card.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from grok1.files import update_sums, write_file


CARD_NAME = "README.md"
# Distinguishes a card from a README that somebody wrote by hand.
MARK = "<!-- Written by `grok1 card` from the files of this folder. -->"
PICTURE = "routing.png"
GIB = 1 << 30
DEVICE = 80 * 10**9  # bytes; a tenth of it is left for activations and buffers


@dataclass(frozen=True)
class Group:
    """Tensors under one heading: how many, their dtypes, elements, and bytes on disk."""

    name: str
    tensors: int
    dtypes: tuple[str, ...]
    elements: int
    nbytes: int


@dataclass(frozen=True)
class Memory:
    """Memory of one precision in bytes: weights, and the key/value cache of one full context.

    Args:
        layers: decoder layers, all of the same size.
        outside: bytes of `weights` outside of the layers (embedding and final norm).
    """

    precision: str
    weights: int
    cache: int
    layers: int
    outside: int

    @property
    def devices(self) -> int | None:
        """Devices of 80 GB that hold both, layers kept whole, a tenth left free; None if not even one layer fits."""
        layer = (self.weights - self.outside + self.cache) / self.layers
        most = int((0.9 * DEVICE - self.outside) // layer)
        return -(-self.layers // most) if most > 0 else None


@dataclass(frozen=True)
class CardFacts:
    """Everything that the card states, measured from headers. Counts of elements and bytes are exact.

    Args:
        parameters: elements of all weights; a tied head and the scales of quantised weights are not counted.
        active_parameters: `parameters` less those of the experts that are not active for a token.
        expert_share: percentage of `parameters` that are experts'.
        precision: dtype of the expert weights.
        layout: hub, fused, hpcai, keyfan or gguf (conversion.names).
        is_release: whether the sizes are those of xAI's released model.
        shards: names of the files with weights.
        description: what a GGUF file says of its numbers.
        weight_bytes: bytes of all tensors; `shard_bytes` adds the headers.
    """

    sizes: dict[str, int]
    parameters: int
    active_parameters: int
    expert_share: float
    precision: str
    layout: str
    tied: bool
    is_release: bool
    groups: tuple[Group, ...]
    shards: tuple[str, ...]
    description: str
    weight_bytes: int
    shard_bytes: int
    memory: tuple[Memory, ...]
    transformers_version: str | None
    tokenizer_pieces: int | None
    has_code: bool
    has_picture: bool

    @property
    def is_packed(self) -> bool:
        """Whether the matrices are in the format of compressed-tensors."""
        return self.precision.startswith("int")

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are GGUF files."""
        return self.layout == "gguf"


def render_card(facts: CardFacts) -> str:
    """The card of a folder as text: YAML metadata, then Markdown."""
    from huggingface_hub import ModelCard, ModelCardData

    title = "Grok-1" if facts.is_release else f"A {_count(facts.parameters)}-parameter model of Grok-1's architecture"
    quantised = [facts.precision] if facts.is_packed or facts.is_gguf else []
    data = ModelCardData(
        license="apache-2.0",
        library_name="gguf" if facts.is_gguf else "transformers",
        pipeline_tag="text-generation",
        base_model="xai-org/grok-1" if facts.is_release else None,
        tags=["grok-1", "mixture-of-experts", "moe", "base-model", *quantised],
    )
    template = resources.files("grok1.model_card").joinpath("template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        mark=MARK,
        title=title,
        facts=facts,
        picture=PICTURE,
        count=_count,
        size=_size,
        gib=GIB,
    )
    return str(card)


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes the card of a folder to its README.md, and its sum if the folder has sums; returns its path."""
    target = Path(folder) / CARD_NAME
    write_file(target, render_card(facts))
    update_sums(Path(folder), CARD_NAME)
    return target


def is_card(file: Path) -> bool:
    """Whether a README is a card that `write_card` wrote, which may be replaced."""
    return MARK in file.read_text(encoding="utf-8", errors="replace")


def _count(number: int) -> str:
    for factor, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def _size(nbytes: int) -> str:
    for factor, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} bytes"
