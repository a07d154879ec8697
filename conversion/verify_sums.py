"""A folder against the SHA-256 sums that the converter wrote, and against the hub's own where it came from there."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from grok1.conversion.journal import JOURNAL_NAME
from grok1.errors import ConversionError
from grok1.files import SUMS_NAME, Progress, hash_file, link_out_of, read_sums


# Where huggingface_hub notes what it downloaded to a folder: the second line is the hub's checksum.
HUB_NOTES = Path(".cache") / "huggingface" / "download"
SHA256, GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}")
# Files that a loader reads or runs: each must have a sum.
LOADED = (".safetensors", ".gguf", ".py", ".bin", ".pt")


@dataclass
class SumsReport:
    """The result of `verify_sums`.

    Args:
        folder: that was checked.
        files, nbytes: how many files were compared, and their bytes.
        from_hub: how many of them were also compared with the hub's own checksums.
        problems: one line per file that is missing, differs or has no sum.
    """

    folder: Path
    files: int = 0
    nbytes: int = 0
    from_hub: int = 0
    problems: list[str] = field(default_factory=list)


def has_sums(folder: Path) -> bool:
    """Whether there is anything to compare the folder with."""
    return (folder / SUMS_NAME).is_file() or bool(_hub_checksums(folder))


def verify_sums(
    folder: str | os.PathLike[str], *, jobs: int | None = None, progress: Progress | None = None
) -> SumsReport:
    """Reads every file that has a sum, in SHA256SUMS or from the hub, and compares it.

    Args:
        folder: a converted folder: local, downloaded, copied, or a snapshot in the cache of the hub.
        jobs: files read at once; by default one per core, at most 8.
        progress: called with (bytes checked, bytes in all), from any thread.

    Raises:
        ConversionError: there are no sums, or they cannot be read.
    """
    folder = Path(folder)
    stated, hub = _stated(folder), _hub_checksums(folder)
    report = SumsReport(folder)
    if (folder / JOURNAL_NAME).exists():
        report.problems.append(f"{JOURNAL_NAME}: expected a finished conversion, found an unfinished one")
    names = sorted(stated.keys() | hub.keys())
    present = []
    for name in names:
        problem = _file_problem(folder / name)
        report.problems += [f"{name}: {problem}"] if problem else []
        present += [] if problem else [name]
    if stated:
        report.problems += [
            f"{path.name}: expected a sum in {SUMS_NAME}, found none"
            for path in sorted(folder.iterdir())
            if path.suffix in LOADED and path.name not in stated
        ]
    total = sum((folder / name).stat().st_size for name in present)
    done, lock = 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            if progress is not None:
                progress(done, total)

    def check(name: str) -> list[str]:
        expected = [checksum for checksum in (stated.get(name), hub.get(name)) if checksum]
        path = folder / name
        found = {len(checksum): _checksum(path, checksum, advance) for checksum in dict.fromkeys(expected)}
        return [
            f"{name}: expected {'SHA-256' if len(checksum) == 64 else 'git'} {checksum}, found {found[len(checksum)]}"
            for checksum in dict.fromkeys(expected)
            if found[len(checksum)] != checksum
        ]

    with ThreadPoolExecutor(jobs or min(8, os.cpu_count() or 1), "grok1-sums") as pool:
        report.problems += [problem for problems in pool.map(check, present) for problem in problems]
    report.files, report.nbytes, report.from_hub = len(present), total, len(hub.keys() & set(present))
    return report


def _stated(folder: Path) -> dict[str, str]:
    path = folder / SUMS_NAME
    try:
        return read_sums(path)
    except FileNotFoundError:
        if _hub_checksums(folder):
            return {}
        raise ConversionError(
            f"{folder}: no sums to compare with",
            [f"expected {SUMS_NAME}, as `grok1 convert` writes it, found none"],
            "Compare a converted folder with its source: grok1 verify FOLDER --against CKPT.",
        ) from None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a file of SHA-256 sums", [str(error)], "Download it again.") from None


def _hub_checksums(folder: Path) -> dict[str, str]:
    """The hub's checksum of each file that huggingface_hub downloaded: a SHA-256, or git's object name."""
    found = {}
    for path in folder.iterdir():
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            found[path.name] = path.resolve().name
        else:
            try:
                lines = (folder / HUB_NOTES / f"{path.name}.metadata").read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError):
                continue
            found |= {path.name: lines[1]} if len(lines) > 1 else {}
    return {name: value for name, value in found.items() if SHA256.fullmatch(value) or GIT.fullmatch(value)}


def _file_problem(path: Path) -> str:
    try:
        outside = link_out_of(path)
    except (OSError, RuntimeError):
        return "expected a file, found a loop of links"
    if outside:
        return f"expected a file of the folder, found a link out of it, to {outside}"
    return "" if path.is_file() else f"expected a file, found {'something else' if path.exists() else 'none'}"


def _checksum(path: Path, like: str, advance: Callable[[int], None]) -> str:
    """The checksum of a file, of the kind of another one: a SHA-256, or git's object name of its content."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    try:
        return hash_file(path, digest, advance)
    except OSError as error:
        return f"an error: {error}"
