"""The README.md of a converted folder: a template, filled with what was measured in the folder.

Nothing is dated, and no sentence depends on where the folder came from: the same facts always give the same card.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from grok1 import REPOSITORY
from grok1.errors import ConversionError
from grok1.files import update_sums, write_file
from grok1.model_card.training_run import TrainingRun


CARD_NAME, LICENSE_NAME = "README.md", "LICENSE"
# Distinguishes a card from a README that somebody wrote by hand.
MARK = "<!-- Written by `grok1 card` from the files of this folder. -->"
PICTURES = ("routing.svg", "routing.png")  # the first that is there is shown
EVALUATION_NAME = "evaluation.json"  # what `grok1 eval --out` writes
REPOSITORY_LINE = re.compile(r'^repo = "([^"\n]+)"$', re.M)
# How the lines of a card begin that hold the name of its repository.
NAMING_LINES = ("repo = ", "| vLLM", "| mlx-lm", "| Transformers' server")
PROMPT, DEMO_PROMPT = "The answer to life, the universe and everything is", "Now is the winter of our"
RELEASE = "xai-org/grok-1"
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
    picture: str | None
    evaluation: dict[str, Any] | None
    training: TrainingRun | None

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

    training = facts.training
    title = "Grok-1" if facts.is_release else f"A {_count(facts.parameters)}-parameter model of Grok-1's architecture"
    if training is not None:
        title += ", fine-tuned"
    tags = ["grok-1", "mixture-of-experts", "moe", "base-model" if training is None else "fine-tuned"]
    tags += [facts.precision] if facts.is_packed or facts.is_gguf else []
    base = training.base_repository if training is not None else None
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="gguf" if facts.is_gguf else "transformers",
        pipeline_tag="text-generation",
        base_model=base or (RELEASE if facts.is_release else None),
        datasets=[training.dataset_id] if training is not None and training.dataset_id else None,
        tags=tags,
        **_model_index(title, facts.evaluation),
    )
    template = resources.files("grok1.model_card").joinpath("template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        mark=MARK,
        title=title,
        facts=facts,
        training=training,
        evaluation=facts.evaluation,
        package=_package(),
        prompt=PROMPT if facts.is_release else DEMO_PROMPT,
        count=_count,
        size=_size,
    )
    return str(card)


def _package() -> str:
    """The package by name, linked where this project has an address."""
    return (
        "the package `modeling-grok1`" if "/OWNER/" in REPOSITORY else f"[the package `modeling-grok1`]({REPOSITORY})"
    )


def _model_index(title: str, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of `ModelCardData` that become the model-index, which the hub shows beside the card."""
    if evaluation is None:
        return {}
    from huggingface_hub import EvalResult

    result = EvalResult(
        task_type="text-generation",
        task_name="Perplexity",
        dataset_type="text",
        dataset_name=evaluation["text"],
        metric_type="perplexity",
        metric_value=round(evaluation["perplexity"], 4),
        metric_name=f"Perplexity, windows of {evaluation['context']} tokens",
    )
    return {"model_name": title, "eval_results": [result]}


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """The figures of `grok1 eval --out` in a folder; None where there are none.

    Raises:
        ConversionError: the file does not hold them.
    """
    path = folder / EVALUATION_NAME
    if not path.is_file():
        return None
    kinds = {"text": str, "text_sha256": str, "predicted": int, "context": int, "precision": str, "perplexity": float}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kind in kinds.items() if not isinstance(found[name], kind)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise ConversionError(
            f"{path}: expected the figures of `grok1 eval`, found {', '.join(wrong)}.",
            next_step="Write it again: grok1 eval FOLDER --text FILE --out FOLDER/evaluation.json",
        )
    return {name: found[name] for name in kinds}


def name_repository(folder: Path, repo_id: str) -> None:
    """Put the name of a repository into the commands of the folder's card, if the card is one of ours."""
    path = Path(folder) / CARD_NAME
    if not path.is_file() or not is_card(path):
        return
    text = path.read_text(encoding="utf-8")
    found = REPOSITORY_LINE.search(text)
    if found is None:
        return
    lines = text.splitlines(keepends=True)
    named = "".join(line.replace(found[1], repo_id) if line.startswith(NAMING_LINES) else line for line in lines)
    if named != text:
        write_file(path, named)
        update_sums(Path(folder), CARD_NAME)


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Writes the card of a folder to its README.md, and its sum if the folder has sums; returns its path."""
    target = Path(folder) / CARD_NAME
    write_file(target, render_card(facts))
    update_sums(Path(folder), CARD_NAME)
    return target


def write_license(folder: Path) -> bool:
    """Writes LICENSE, if the folder has none; returns whether it was written."""
    path = Path(folder) / LICENSE_NAME
    if path.exists():
        return False
    write_file(path, resources.files("grok1.model_card").joinpath(LICENSE_NAME).read_bytes())
    update_sums(Path(folder), LICENSE_NAME)
    return True


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
