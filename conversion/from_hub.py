"""A checkpoint on the Hugging Face hub as the source of a conversion: `hf://owner/name[@revision]`.

A few files are fetched ahead of the converter, and each is checked against the checksum that the hub states. With
`discard_source` each is deleted when no unfinished shard needs it, and the fetched files never exceed their bound.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, RepoFile, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from grok1.conversion.inputs import Checkpoint, find_tokenizer, read_config
from grok1.conversion.names import Entry, checkpoint_entries
from grok1.conversion.settings import Settings
from grok1.conversion.tokenizer import TOKENIZER_NAME
from grok1.conversion.xai.checkpoint import TENSOR_FILE, TensorFile, mismatches, read_tensor_file
from grok1.conversion.xai.writer import tensor_frame
from grok1.errors import CheckpointError, ConversionError
from grok1.files import hash_file
from modeling_grok1.configuration_grok1 import GrokConfig


SCHEME = "hf://"
URI = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?/?")
SCRATCH_NAME = ".source.partial"  # inside the output folder, removed when the conversion is done
# Without `discard_source`, files stay in the hub's cache and only the running downloads are bounded.
AHEAD = 3
ATTEMPTS = 6


@dataclass(frozen=True)
class HubCheckpoint:
    """What a repository holds, at one commit.

    Args:
        repo: owner/name.
        commit: the commit of the revision when it was looked up; everything is read from it.
        modified_ns: when the repository was last changed, in nanoseconds since 1970; 0 if the hub does not say.
        files: every file of the repository by its path.
    """

    repo: str
    commit: str
    modified_ns: int
    files: dict[str, RepoFile]

    def path_of(self, file: str) -> str | None:
        """The path of a tensor file: at the top, in ckpt-0/ or in ckpt/."""
        return next((p + file for p in ("", "ckpt-0/", "ckpt/") if p + file in self.files), None)

    def download(self, path: str, folder: Path | None = None, force: bool = False) -> Path:
        """Fetches one file into the hub's cache or below `folder`; resumes a partial download."""
        return Path(hf_hub_download(self.repo, path, revision=self.commit, local_dir=folder, force_download=force))


def look_up(uri: str) -> HubCheckpoint:
    """The repository that `hf://owner/name[@revision]` names.

    Raises:
        ConversionError: the address is malformed, or the hub has no such repository or revision for this user.
    """
    match = URI.fullmatch(uri)
    if match is None:
        raise ConversionError(f"{uri}: expected hf://owner/name or hf://owner/name@revision")
    try:
        api = HfApi()
        info = api.repo_info(match["repo"], revision=match["revision"])
        commit = info.sha
        tree = api.list_repo_tree(match["repo"], recursive=True, revision=commit)
        files = {item.path: item for item in tree if isinstance(item, RepoFile)}
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConversionError(
            f"{uri}: the hub shows no such repository or revision",
            next_step="Check the name; for a private one, log in with `hf auth login`.",
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError) as error:
        raise ConversionError(f"{uri}: the hub did not answer", [str(error)], "Run it again.") from error
    modified = getattr(info, "last_modified", None)
    return HubCheckpoint(match["repo"], str(commit), int(modified.timestamp() * 1e9) if modified else 0, files)


def examine(checkpoint: HubCheckpoint, entries: Sequence[Entry]) -> tuple[dict[int, RepoFile], list[str]]:
    """The repository's file for each entry, and what is missing, unknown or of an impossible size.

    Sizes are exact: a file of xAI's format with given shapes has one size per number of scale blocks.
    """
    files, problems = {}, []
    known = {entry.file for entry in entries}
    for entry in entries:
        path = checkpoint.path_of(entry.file)
        if path is None:
            problems.append(f"{entry.file}: expected {entry.path}, found no such file")
        elif blocks_of_size(entry, checkpoint.files[path].size) is None:
            problems.append(
                f"{entry.file}: expected the size of {entry.path} as {entry.dtype} {entry.shape}, "
                f"found {checkpoint.files[path].size} bytes"
            )
        else:
            files[entry.index] = checkpoint.files[path]
    for path in checkpoint.files:
        name = path.rpartition("/")[2]
        if TENSOR_FILE.fullmatch(name) and name not in known:
            problems.append(f"{path}: expected {len(entries)} files, the last {entries[-1].file}, found one more")
    return files, problems


def blocks_of_size(entry: Entry, size: int) -> int | None:
    """The number of scale blocks that a file of this size has (0: not quantised), or None if there is none."""
    if not entry.kind.quantised:
        return 0 if tensor_frame(entry.shape).size == size else None
    rows = entry.shape[-2]
    fitting = (G for G in range(1, min(rows, 64) + 1) if rows % G == 0)
    return next((G for G in fitting if tensor_frame(entry.shape, entry.scales_shape(G)).size == size), None)


class HubSource:
    """`ports.Source` over a repository.

    Args:
        checkpoint: the repository.
        entries: the files that the model needs.
        files: the repository's file for each entry's index (`examine`).
        scratch: the folder of fetched files with `discard_source`; None keeps them in the hub's cache.
        scratch_limit: bound on the bytes below `scratch`.
    """

    def __init__(
        self,
        checkpoint: HubCheckpoint,
        entries: Sequence[Entry],
        files: dict[int, RepoFile],
        scratch: Path | None,
        scratch_limit: int,
    ):
        self.checkpoint, self.files = checkpoint, files
        self.entries = {entry.index: entry for entry in entries}
        self.scratch, self.scratch_limit = scratch, scratch_limit
        self.queue: deque[int] = deque()
        self.futures: dict[int, Future[TensorFile]] = {}
        self.in_use = 0
        self.lock = threading.RLock()  # a download that is done at once calls back while it is held
        self.pool = ThreadPoolExecutor(AHEAD, "grok1-fetch")
        self.stopped = threading.Event()

    @property
    def scratch_bytes(self) -> int:
        return 0 if self.scratch is None else self.scratch_limit

    def changed_since(self, moment_ns: int) -> list[str]:
        if self.checkpoint.modified_ns <= moment_ns:
            return []
        return [f"hf://{self.checkpoint.repo}: changed after the conversion"]

    def order_problems(self, needed: Sequence[Sequence[int]]) -> list[str]:
        least = scratch_needed(needed, self.files)
        if self.scratch is None or least <= self.scratch_limit:
            return []
        return [f"scratch: expected at least {least:,} bytes for shards of this size, found {self.scratch_limit:,}"]

    def scale_blocks(self) -> dict[int, int]:
        blocks = {index: blocks_of_size(self.entries[index], file.size) for index, file in self.files.items()}
        return {index: count for index, count in blocks.items() if count}

    def local_files(self) -> dict[int, TensorFile]:
        return {}

    def identity(self) -> dict[str, Any]:
        return {file.path: [file.size, stated_checksum(file)[1]] for file in self.files.values()}

    def schedule(self, indices: Sequence[int]) -> None:
        with self.lock:
            self.queue.extend(indices)
            self._pump()

    def _pump(self) -> None:
        """Starts the downloads that fit; called with the lock held."""
        while self.queue:
            index = self.queue[0]
            size = self.files[index].size
            if self.scratch is not None:
                if self.in_use + size > self.scratch_limit:
                    return
            elif sum(not future.done() for future in self.futures.values()) >= AHEAD:
                return
            self.queue.popleft()
            self.in_use += size
            self.futures[index] = self.pool.submit(self._fetch, index)
            self.futures[index].add_done_callback(lambda _: self._pump_again())

    def _pump_again(self) -> None:
        with self.lock:
            if not self.stopped.is_set():
                self._pump()

    def open(self, index: int) -> TensorFile:
        while True:
            with self.lock:
                future = self.futures.get(index)
            if future is not None:
                return future.result()
            time.sleep(0.02)  # it is fetched when a shard that is being finished releases its files

    def release(self, index: int) -> None:
        with self.lock:
            future = self.futures.pop(index, None)
            if future is not None and self.scratch is not None:
                future.result().path.unlink(missing_ok=True)
                self.in_use -= self.files[index].size
            if not self.stopped.is_set():
                self._pump()

    def close(self, finished: bool) -> None:
        """Stops fetching. If the conversion is not finished, fetched files stay for the next run."""
        self.stopped.set()
        self.pool.shutdown(cancel_futures=True)
        if finished and self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _fetch(self, index: int) -> TensorFile:
        """Fetches and checks one file and reads its header. Retries after network errors and wrong bytes."""
        file, entry = self.files[index], self.entries[index]
        fault = ""
        for attempt in range(ATTEMPTS):
            if self.stopped.is_set():
                break
            if attempt:
                self.stopped.wait(min(0.25 * 2**attempt, 30))
            try:
                path = self.checkpoint.download(file.path, self.scratch, force=bool(attempt))
                fault = checksum_problem(path, file)
                if not fault:
                    tensor = read_tensor_file(path)
                    problems = mismatches(entry, tensor)
                    if problems:
                        raise CheckpointError(f"{self.checkpoint.repo}: not the checkpoint of this config", problems)
                    return tensor
                path.unlink(missing_ok=True)
            except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
                status = getattr(getattr(error, "response", None), "status_code", 500)
                fault = f"{type(error).__name__}: {error}"
                if status < 500 and status not in (408, 429):
                    break
        raise CheckpointError(
            f"hf://{self.checkpoint.repo}: {file.path} could not be fetched",
            [fault or "stopped"],
            "Finished shards are kept: run the same command again to continue.",
        )


def stated_checksum(file: RepoFile) -> tuple[str, str]:
    """How the hub states what is in a file: SHA-256 for large files, git's object name for small ones."""
    return ("sha256", file.lfs.sha256) if file.lfs is not None else ("git", file.blob_id)


def checksum_problem(path: Path, file: RepoFile) -> str:
    """What differs between a file on the disk and what the hub states, or nothing."""
    kind, expected = stated_checksum(file)
    size = path.stat().st_size
    if size != file.size:
        return f"{file.path}: expected {file.size} bytes, found {size}"
    found = hash_file(path, hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size))
    return "" if found == expected else f"{file.path}: expected {kind} {expected}, found {found}"


def scratch_needed(needed: Sequence[Sequence[int]], files: dict[int, RepoFile]) -> int:
    """The most bytes of source files that shards in this order need on the disk at once.

    Args:
        needed: for each shard the indices of its source files.
        files: the repository's files by index.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position, indices in enumerate(needed):
        for index in indices:
            first.setdefault(index, position)
            last[index] = position
    return max(
        (
            sum(files[index].size for index in first if first[index] <= position <= last[index])
            for position in range(len(needed))
        ),
        default=0,
    )


def find_on_hub(uri: str, out: Path, settings: Settings) -> Checkpoint:
    """The checkpoint in a repository. Nothing but its list of files, config and tokenizer is fetched.

    Raises:
        ConversionError: there is no such repository, or no config. Other problems are in the result.
    """
    found = look_up(uri)
    if settings.config is not None:
        config = read_config(Path(settings.config))
    elif "config.json" in found.files:
        config = read_config(found.download("config.json"))
    else:
        config = GrokConfig()
    tokenizer: Path | None = None
    problems: list[str] = []
    if not settings.no_tokenizer:
        candidates = [Path(found.repo) / TOKENIZER_NAME]
        if settings.tokenizer is None and TOKENIZER_NAME in found.files:
            candidates = [found.download(TOKENIZER_NAME)]
        tokenizer, problems = find_tokenizer(candidates, settings, config.vocab_size)
    entries = checkpoint_entries(config)
    files, file_problems = examine(found, entries)
    scratch = out / SCRATCH_NAME if settings.discard_source else None
    limit = 0 if settings.problems() else settings.scratch_bytes
    source = HubSource(found, entries, files, scratch, limit)
    next_step = "If many sizes are wrong, the config is: see --config."
    return Checkpoint(uri, config, tokenizer, source, file_problems, problems, next_step)
