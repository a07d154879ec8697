"""Where the files of a checkpoint come from and where finished shards go: protocols, and local folders as both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from grok1.conversion.shards import Shard
from grok1.conversion.xai.checkpoint import TensorFile


class Source(Protocol):
    """The files of a checkpoint, by their index."""

    @property
    def scratch_bytes(self) -> int:
        """Disk space that the source itself takes in the output folder while it is read."""

    def scale_blocks(self) -> dict[int, int]:
        """Row blocks with a scale of their own, by index, for each quantised file."""

    def local_files(self) -> dict[int, TensorFile]:
        """The files that can be read before they are announced, by index."""

    def identity(self) -> dict[str, Any]:
        """What distinguishes this source from another one, as JSON values, by file name."""

    def changed_since(self, moment_ns: int) -> list[str]:
        """What of the source changed after a moment (nanoseconds since 1970), one line each."""

    def order_problems(self, needed: Sequence[Sequence[int]]) -> list[str]:
        """Why shards that need these files, in this order, cannot be read; one line per problem."""

    def schedule(self, indices: Sequence[int]) -> None:
        """Announces the files that will be opened, in order. A file may be opened again until it is released."""

    def open(self, index: int) -> TensorFile:
        """The file, ready to be read. May block until it is fetched."""

    def release(self, index: int) -> None:
        """No unfinished shard needs this file any more."""

    def close(self, finished: bool) -> None:
        """The conversion ended; `finished` says whether it is complete."""


class Sink(Protocol):
    """What receives finished files. Its methods can be called again for what was received already."""

    @property
    def keeps_shards(self) -> bool:
        """Whether a finished shard stays on the local disk."""

    def has(self, shard: Shard, out: Path) -> bool:
        """Whether an earlier run finished the shard."""

    def shard_finished(self, path: Path) -> None:
        """Called once per shard, when it is on the disk under its final name."""

    def folder_finished(self, out: Path) -> None:
        """Called last, when everything else is written."""


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint in a local folder.

    Args:
        files: the tensor files, by their index.
    """

    files: dict[int, TensorFile]

    @property
    def scratch_bytes(self) -> int:
        return 0

    def scale_blocks(self) -> dict[int, int]:
        return {index: file.scales.shape[-2] for index, file in self.files.items() if file.scales is not None}

    def local_files(self) -> dict[int, TensorFile]:
        return self.files

    def identity(self) -> dict[str, Any]:
        return {file.path.name: file.state.lasting for file in self.files.values()}

    def changed_since(self, moment_ns: int) -> list[str]:
        return [
            f"{file.path}: changed after the conversion"
            for file in self.files.values()
            if max(file.state.mtime_ns, file.state.ctime_ns) > moment_ns
        ]

    def order_problems(self, needed: Sequence[Sequence[int]]) -> list[str]:
        return []

    def schedule(self, indices: Sequence[int]) -> None:
        pass

    def open(self, index: int) -> TensorFile:
        self.files[index].check_unchanged()
        return self.files[index]

    def release(self, index: int) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


class FolderSink:
    """Leaves finished files where they are."""

    keeps_shards = True

    def has(self, shard: Shard, out: Path) -> bool:
        """Whether the shard has its final name, its size and its header."""
        path = out / shard.name
        if not path.is_file() or path.stat().st_size != shard.nbytes:
            return False
        with path.open("rb") as file:
            return file.read(len(shard.header)) == shard.header

    def shard_finished(self, path: Path) -> None:
        pass

    def folder_finished(self, out: Path) -> None:
        pass
