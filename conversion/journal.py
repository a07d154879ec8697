"""The record of an unfinished conversion, and the lock on its folder.

The record is written once, before the first shard, and holds what would make another run's bytes differ: the settings
and the source. What is done needs no record: a shard has its final name only when it is finished. The last act of a
conversion removes the record: a finished folder does not depend on when, where or in how many runs it was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from grok1.errors import ConversionError
from grok1.files import PARTIAL_SUFFIX, atomic_write, sync_folder


JOURNAL_NAME = ".grok1-conversion.json"
LOCK_NAME = ".grok1-conversion.lock"
OWN_NAMES = frozenset({JOURNAL_NAME, JOURNAL_NAME + PARTIAL_SUFFIX, LOCK_NAME})
OTHER_PLACE = "Choose an empty folder, or repeat the command that began the conversion there."


def output_problems(out: Path, record: dict[str, Any]) -> list[str]:
    """Why a conversion with this record cannot begin or resume in `out`, one line per problem.

    `record` is {"settings": {name: value}, "source": {file: identity}}, as JSON values.
    """
    if not os.path.lexists(out):
        return []
    if not out.is_dir():
        return [f"{out}: expected a folder or nothing, found a file"]
    others = sorted(entry.name for entry in os.scandir(out) if entry.name not in OWN_NAMES)
    found = read_journal(out)
    if found is None:
        return [f"{out}: expected an empty folder or none, found {', '.join(others[:5])}"] if others else []
    return [
        *_differences(found.get("settings"), record["settings"], ""),
        *_differences(found.get("source"), record["source"], "source "),
    ]


@contextmanager
def claimed(out: Path, record: dict[str, Any]) -> Iterator[None]:
    """Locks `out` for this conversion until the block ends. The record is removed if the block ends without an error.

    Raises:
        ConversionError: another process is converting to `out`, or what is there is not ours (`output_problems`).
        OSError: the folder or the record cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    journal = out / JOURNAL_NAME
    with locked(out):
        problems = output_problems(out, record)
        if problems:
            raise ConversionError(f"{out}: not a place for this conversion", problems, OTHER_PLACE)
        if read_journal(out) is None:
            with atomic_write(journal) as file:
                file.write((json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
        yield
        # In this order: a folder without a record is complete.
        with suppress(PermissionError):  # Windows keeps open files; `locked` removes it there
            (out / LOCK_NAME).unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        sync_folder(out)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock on a folder. The lock file is removed where no unfinished conversion needs it.

    Raises:
        ConversionError: another process holds it.
    """
    lock = FileLock(out / LOCK_NAME, timeout=0, mode=0o644)
    try:
        lock.acquire()
    except Timeout:
        raise ConversionError(
            f"{out}: another conversion is writing there",
            next_step="Wait until it is done, or choose another folder.",
        ) from None
    try:
        yield
    finally:
        begun = (out / JOURNAL_NAME).exists()
        if not begun and os.name != "nt":
            # While it is held: after that it may be the lock of another process.
            (out / LOCK_NAME).unlink(missing_ok=True)
        lock.release()
        if not begun and os.name == "nt":
            with suppress(OSError):
                (out / LOCK_NAME).unlink(missing_ok=True)


def read_journal(out: Path) -> dict[str, Any] | None:
    """The record in a folder, or None if there is none."""
    try:
        record = json.loads((out / JOURNAL_NAME).read_bytes())
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
