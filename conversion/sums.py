"""The SHA-256 of every file of a converted folder, in one file that `sha256sum -c` reads.

While a conversion is unfinished, the sums of its finished shards are in a record beside them: a shard is hashed once,
and a shard that was uploaded and deleted keeps its sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from grok1.files import PARTIAL_SUFFIX, SUMS_NAME, read_sums, sha256_of, sums_text, write_file


RECORD_NAME = ".grok1-conversion.sums"
RECORD_NAMES = (RECORD_NAME, RECORD_NAME + PARTIAL_SUFFIX)


def recorded_sums(out: Path) -> dict[str, str]:
    """The sums that are known of a folder, finished or not; none where there is no readable record."""
    for name in (RECORD_NAME, SUMS_NAME):
        try:
            return read_sums(out / name)
        except (OSError, ValueError):
            continue
    return {}


def record_sum(path: Path) -> None:
    """Hashes a finished shard and records its sum."""
    sums = recorded_sums(path.parent) | {path.name: sha256_of(path)}
    write_file(path.parent / RECORD_NAME, sums_text(sums))


def write_sums(staging: Path, out: Path, shards: Iterable[str]) -> None:
    """Writes the file of sums to `staging`: of the files there, and of the shards in `out` or on record."""
    known = recorded_sums(out)
    sums = {name: known.get(name) or sha256_of(out / name) for name in shards}
    sums |= {path.name: sha256_of(path) for path in staging.iterdir()}
    write_file(staging / SUMS_NAME, sums_text(sums))
