"""Sizes and SHA-256 of the released checkpoint's files against the published values: parallel and restartable."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grok1.conversion.release import ReleaseFile, release_files
from grok1.conversion.xai.checkpoint import foreign_entries, list_files, resolve_folder, surplus_files
from grok1.errors import CheckpointError, ConversionError
from grok1.files import FileState, Progress, sha256_of, write_file


STATE_NAME = ".grok1-verify.json"
# The state is written at most once in so many seconds: the hashing that a kill can cost.
STATE_SECONDS = 1.0


@dataclass
class Verification:
    """The result of `verify_source`.

    Args:
        folder: where the tensor files are.
        state: the file that records what was checked.
        right: how many files are as published, and `nbytes` their bytes.
        remembered: how many of all were not read again, because an earlier run checked them and they are unchanged.
        missing: names of files that are not there.
        problems: everything else, one line each: expected and found.
    """

    folder: Path
    state: Path
    right: int = 0
    nbytes: int = 0
    remembered: int = 0
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.missing and not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "folder": str(self.folder), "state": str(self.state), "is_whole": self.is_whole}


def verify_source(
    source: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    state: str | os.PathLike[str] | None = None,
    release: Iterable[ReleaseFile] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Reads every file that has its published size and compares its SHA-256.

    An interrupted run resumes: a file that was checked is not read again while its size and modification time are the
    same.

    Args:
        source: the folder that holds the tensor files, or the one above its ckpt-0/ or ckpt/.
        jobs: files read at once; by default one per core, at most 8.
        state: where to record what was checked; by default a hidden file in the folder, or one below
            $XDG_CACHE_HOME (~/.cache) if the folder cannot be written.
        release: what was published; by default the table of the package.
        progress: called with (bytes checked, bytes in all), from any thread.

    Raises:
        CheckpointError: there is no tensor file, or none has its published size: not the release.
        ConversionError: `state` cannot be written.
    """
    folder = resolve_folder(source)
    published = list(release_files() if release is None else release)
    problems, refused = foreign_entries(folder)
    present = {path.name: path for path in list_files(folder)}
    problems += surplus_files(present, [file.entry for file in published])
    missing, to_check = [], []
    for file in published:
        name = file.entry.file
        if name not in present:
            missing.append(name)
        elif name not in refused:
            size = present[name].stat().st_size
            if size == file.size:
                to_check.append((present[name], file))
            else:
                problems.append(f"{name}: expected {file.size} bytes, found {size}")
    if not to_check:
        raise CheckpointError(
            f"{folder}: not the released checkpoint, or nothing of it is finished",
            [f"expected {len(published)} files of the published sizes, found none among {len(present)}"],
            "Checksums were published for the release only. `grok1 inspect` examines any checkpoint.",
        )
    memory = _Memory(folder, state)
    result = Verification(folder, memory.path, missing=missing, problems=problems)
    _Checker(memory, sum(file.size for _, file in to_check), progress).check(to_check, jobs, result)
    result.problems.sort()
    return result


class _Memory:
    """The state file: {"files": {name: [size, mtime_ns, sha256]}}."""

    def __init__(self, folder: Path, state: str | os.PathLike[str] | None):
        self.folder = folder
        self.path = Path(state) if state is not None else self.default_path(folder)
        try:
            files = json.loads(self.path.read_bytes())["files"]
            self.files = {name: entry for name, entry in files.items() if _is_entry(entry)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.files = {}
        self.lock = threading.Lock()
        self.saved = 0.0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.save()
        except (OSError, ConversionError) as error:
            raise ConversionError(
                f"{self.path}: cannot be written", [str(error)], "Name another file with --state."
            ) from None

    @staticmethod
    def default_path(folder: Path) -> Path:
        if os.access(folder, os.W_OK):
            return folder / STATE_NAME
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        return cache / "grok1" / f"verify-{digest}.json"

    def get(self, name: str, size: int, mtime_ns: int) -> str | None:
        """The checksum of a file, if it was read before and is unchanged."""
        entry = self.files.get(name)
        return entry[2] if entry is not None and entry[:2] == [size, mtime_ns] else None

    def put(self, name: str, size: int, mtime_ns: int, sha256: str) -> None:
        with self.lock:
            self.files[name] = [size, mtime_ns, sha256]
            if time.monotonic() - self.saved > STATE_SECONDS:
                self.save()

    def save(self) -> None:
        write_file(self.path, json.dumps({"files": self.files}, indent=0) + "\n")
        self.saved = time.monotonic()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(value) for value in entry] == [int, int, str]


class _Checker:
    def __init__(self, memory: _Memory, total: int, progress: Progress | None):
        self.memory, self.total, self.progress = memory, total, progress
        self.done, self.lock = 0, threading.Lock()
        self.stopped = threading.Event()

    def check(self, files: list[tuple[Path, ReleaseFile]], jobs: int | None, result: Verification) -> None:
        """Adds what it finds to `result`. However it ends, what was checked is recorded."""
        pool = ThreadPoolExecutor(jobs or min(8, os.cpu_count() or 1), "grok1-verify")
        try:
            futures = [pool.submit(self.check_file, path, file, result) for path, file in files]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What was checked is recorded: run the same command again to resume.") from None
        finally:
            self.stopped.set()
            pool.shutdown(cancel_futures=True)
            self.memory.save()

    def check_file(self, path: Path, file: ReleaseFile, result: Verification) -> None:
        name = file.entry.file
        try:
            before = FileState.of(path)
            sha256 = self.memory.get(name, before.size, before.mtime_ns)
            remembered = sha256 is not None
            if sha256 is None:
                sha256 = self.checksum(path)
                if FileState.of(path) != before:
                    raise CheckpointError(
                        f"{name}: expected a file that does not change, found one that changed while it was read"
                    )
                self.memory.put(name, before.size, before.mtime_ns, sha256)
            else:
                self.advance(file.size)
            problem = "" if sha256 == file.sha256 else f"{name}: expected SHA-256 {file.sha256}, found {sha256}"
        except (OSError, CheckpointError) as error:
            remembered, problem = False, error.summary if isinstance(error, CheckpointError) else f"{name}: {error}"
        with self.lock:
            result.remembered += remembered
            if problem:
                result.problems.append(problem)
            else:
                result.right += 1
                result.nbytes += file.size

    def checksum(self, path: Path) -> str:
        def advance(count: int) -> None:
            if self.stopped.is_set():
                raise CheckpointError(f"{path.name}: not checked: interrupted")
            self.advance(count)

        return sha256_of(path, advance)

    def advance(self, count: int) -> None:
        with self.lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.done, self.total)
