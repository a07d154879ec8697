"""The released checkpoint, file by file: what was published (configuration/release.tsv) beside the table of names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import SimpleNamespace

from grok1.conversion.names import Entry, GrokSizes, checkpoint_entries


@dataclass(frozen=True)
class ReleaseFile:
    """One of the 770 released files: `size` in bytes and `sha256` in lowercase hex are those of the whole file."""

    entry: Entry
    size: int
    sha256: str

    @property
    def scales_shape(self) -> tuple[int, ...] | None:
        """The shape of the scales, or None where the tensor is not quantised."""
        kind = self.entry.kind
        return self.entry.scales_shape(kind.scale_blocks) if kind.quantised else None


@cache
def release_sizes() -> GrokSizes:
    """The sizes of the released model."""
    preset = resources.files("grok1.configuration").joinpath("grok-1.json").read_text(encoding="utf-8")
    return SimpleNamespace(**json.loads(preset))


def has_release_sizes(config: GrokSizes) -> bool:
    """Whether a model has the sizes of the released one."""
    return all(getattr(config, key) == getattr(release_sizes(), key) for key in GrokSizes.__annotations__)


@cache
def release_files() -> tuple[ReleaseFile, ...]:
    """All 770 files of the release in the order of their index: 318,239,886,140 bytes."""
    table = resources.files("grok1.configuration").joinpath("release.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in table.splitlines()[1:]]
    entries = checkpoint_entries(release_sizes())
    assert [int(index) for index, _, _ in rows] == [entry.index for entry in entries]
    return tuple(ReleaseFile(entry, int(size), sha256) for entry, (_, size, sha256) in zip(entries, rows, strict=True))
