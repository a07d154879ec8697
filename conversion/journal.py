"""The record of an unfinished conversion: one file in the output folder, which is its lock too.

It is written once, before the first shard, and says what would make another run's bytes differ: the settings and the
source. What is done needs no record: a shard has its final name only when it is finished. The last act of a conversion
removes the file, so that nothing in a finished folder tells when, where or in how many runs it was made.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grok1.errors import ConversionError


JOURNAL_NAME = ".grok1-conversion.json"
PARTIAL_SUFFIX = ".partial"
OTHER_PLACE = "Choose an empty folder, or repeat the command that began the conversion there."


def output_problems(out: Path, record: dict[str, Any]) -> list[str]:
    """Why a conversion with this record cannot go to `out`, one line each; none if it can begin there or go on.

    `record` is {"settings": {name: value}, "source": {file: identity}}, as JSON values.
    """
    if not os.path.lexists(out):
        return []
    if not out.is_dir():
        return [f"{out}: expected a folder or nothing, found a file"]
    journal = out / JOURNAL_NAME
    others = sorted(entry.name for entry in os.scandir(out) if entry.name != JOURNAL_NAME)
    found = _read(journal)
    if found is None:
        # A journal without a readable record was cut off before the first shard: then nothing else is there.
        return [f"{out}: expected an empty folder or none, found {', '.join(others[:5])}"] if others else []
    return [
        *_differences(found.get("settings"), record["settings"], ""),
        *_differences(found.get("source"), record["source"], "source "),
    ]


@contextmanager
def claimed(out: Path, record: dict[str, Any]) -> Iterator[None]:
    """Makes `out` the folder of this conversion, alone, until the block ends; the journal goes if it ends well.

    Raises:
        ConversionError: another process is converting to `out`, or what is there is not ours (`output_problems`).
        OSError: the folder or the journal cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = out / JOURNAL_NAME
    descriptor = _locked(journal)
    try:
        problems = output_problems(out, record)
        if problems:
            if os.fstat(descriptor).st_size == 0:
                journal.unlink()
            raise ConversionError(f"{out}: not a place for this conversion", problems, OTHER_PLACE)
        if _read(journal) is None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode(), 0)
            os.fsync(descriptor)
            sync_folder(out)
        yield
        journal.unlink()
        sync_folder(out)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(journal: Path) -> int:
    while True:
        descriptor = os.open(journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run before this one may have removed the file between our open and our lock.
            if os.path.samestat(os.fstat(descriptor), journal.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise ConversionError(
                f"{journal.parent}: another conversion is writing there",
                next_step="Wait until it is done, or choose another folder.",
            ) from None
        os.close(descriptor)


def _read(journal: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(journal.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _differences(found: Any, expected: dict[str, Any], prefix: str) -> list[str]:
    found = found if isinstance(found, dict) else {}
    problems = []
    for key in sorted(found.keys() | expected.keys()):
        theirs, ours = found.get(key), expected.get(key)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            problems += _differences(theirs, ours, f"{prefix}{key} ")
        elif theirs != ours:
            problems.append(f"{prefix}{key}: the unfinished conversion there has {theirs!r}, this one {ours!r}")
    return problems
