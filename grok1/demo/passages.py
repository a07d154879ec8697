"""The bundled checkpoint, a small trained Grok-1 in xAI's format, and the passages that it reproduces."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grok1.errors import ConversionError


if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Passage:
    """A text of the training set. The model reproduces `continuation` after `opening`, greedily."""

    opening: str
    continuation: str
    source: str

    @property
    def text(self) -> str:
        return self.opening + self.continuation


@dataclass(frozen=True)
class Generated:
    """What the model generated after each opening.

    Args:
        passages: in order.
        continuations: the generated text of each, as long as the passage's own continuation.
        tokens_per_second: of the batch.
    """

    passages: tuple[Passage, ...]
    continuations: tuple[str, ...]
    tokens_per_second: float

    @property
    def exact(self) -> int:
        """How many continuations are the passage's, character by character."""
        pairs = zip(self.passages, self.continuations, strict=True)
        return sum(passage.continuation == text for passage, text in pairs)


@contextmanager
def bundled_checkpoint() -> Iterator[Path]:
    """The folder with ckpt-0/, config.json, tokenizer.model and passages.json."""
    with as_file(files("grok1") / "demo") as folder:
        yield folder


def copy_checkpoint(bundled: Path, out: Path) -> None:
    """Copy the files of the checkpoint, without the demo's own. Raises ConversionError where the folder exists."""
    if out.exists():
        raise ConversionError(f"{out}: expected no such folder, found one.", next_step="Give a new --checkpoint.")
    shutil.copytree(bundled / "ckpt-0", out / "ckpt-0")
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(bundled / name, out / name)


def read_passages(checkpoint: Path) -> tuple[Passage, ...]:
    """The passages in the checkpoint's passages.json."""
    return tuple(Passage(**entry) for entry in json.loads((checkpoint / "passages.json").read_text(encoding="utf-8")))


def generate_passages(model: PreTrainedModel, tokenizer: Any, passages: tuple[Passage, ...]) -> Generated:
    """Continue every opening greedily, in one batch."""
    from transformers import pipeline

    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    openings = [passage.opening for passage in passages]
    lengths = [len(ids) for ids in tokenizer([passage.text for passage in passages])["input_ids"]]
    steps = max(lengths) - min(len(ids) for ids in tokenizer(openings)["input_ids"])
    start = time.perf_counter()
    outputs = generator(openings, batch_size=len(openings), max_new_tokens=steps, do_sample=False)
    seconds = time.perf_counter() - start
    texts = [output[0]["generated_text"] for output in outputs]
    return Generated(
        passages,
        tuple(text[len(p.opening) : len(p.text)] for p, text in zip(passages, texts, strict=True)),
        len(passages) * steps / seconds,
    )
