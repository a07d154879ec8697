"""A repository on the Hugging Face hub as the sink of a conversion.

Each shard is uploaded and committed when it is finished; config, code, index, sums and card follow in one last commit.
A repository without an index is not a model for any loader, so an unfinished upload is never taken for a model. GGUF
files have no index: there the sums come last.

What the hub has is found by comparing its checksums with the recorded sums (`sums`), so every step can be repeated.
"""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from grok1.conversion.from_hub import checksum_problem
from grok1.conversion.journal import OWN_NAMES
from grok1.conversion.ports import FolderSink
from grok1.conversion.shards import Shard
from grok1.conversion.sums import RECORD_NAMES, recorded_sums
from grok1.errors import ConversionError
from grok1.files import INDEX_NAME, SUMS_NAME
from grok1.model_card.card import name_repository


SHARDS = ("model-*.safetensors", "*.gguf")
# With the last commit, in which they come, a repository is whole.
LAST = (INDEX_NAME, SUMS_NAME)


class HubSink(FolderSink):
    """`ports.Sink` that uploads.

    Args:
        repo: owner/name; created with the first upload if it does not exist.
        out: the folder of the conversion.
        private: whether a new repository is private.
        discard: delete each local shard when the hub has it.

    Raises:
        ConversionError: the repository cannot be read, or already holds a complete model of something else.
    """

    def __init__(self, repo: str, out: Path, private: bool = False, discard: bool = False):
        self.repo, self.private, self.discard, self.api = repo, private, discard, HfApi()
        self.keeps_shards = not discard
        self.exists = True
        self.remote = self._list()
        whole = [name for name in LAST if name in self.remote]
        if whole and not self._is_ours(out):
            raise ConversionError(
                f"{repo}: expected an empty repository or an unfinished upload, found a whole model ({whole[0]})",
                next_step="Push to another repository, or delete the files of this one first.",
            )

    def has(self, shard: Shard, out: Path) -> bool:
        """Whether an earlier run finished the shard: the hub has the bytes that were written, or they are here."""
        return self._uploaded(shard.name, recorded_sums(out)) or super().has(shard, out)

    def shard_finished(self, path: Path) -> None:
        if not self._uploaded(path.name, recorded_sums(path.parent)):
            self._commit([path], f"Add {path.name}")
            self.remote = self._list()
            problem = checksum_problem(path, self.remote[path.name])
            if problem:
                raise ConversionError(f"{self.repo}: not what was uploaded", [problem])
        if self.discard:
            path.unlink()

    def folder_finished(self, out: Path) -> None:
        shards = sorted(path for pattern in SHARDS for path in out.glob(pattern))
        for path in shards:  # an earlier run may have ended between writing and uploading one
            self.shard_finished(path)
        name_repository(out, self.repo)
        skip = {*OWN_NAMES, *RECORD_NAMES, *(path.name for path in shards)}
        files = [path for path in sorted(out.iterdir()) if path.is_file() and path.name not in skip]
        files = [
            path for path in files if path.name not in self.remote or checksum_problem(path, self.remote[path.name])
        ]
        if files:
            self._commit(files, "Add config, code, tokenizer, index, sums and card")

    def _is_ours(self, out: Path) -> bool:
        """Whether the shards of the repository are those that an earlier run wrote to `out`."""
        sums = recorded_sums(out)
        shards = [name for name in self.remote if any(Path(name).match(pattern) for pattern in SHARDS)]
        return bool(shards) and all(self._uploaded(name, sums) for name in shards)

    def _uploaded(self, name: str, sums: dict[str, str]) -> bool:
        remote = self.remote.get(name)
        return remote is not None and remote.lfs is not None and remote.lfs.sha256 == sums.get(name)

    def _commit(self, paths: list[Path], message: str) -> None:
        operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        try:
            if not self.exists:
                self.api.create_repo(self.repo, private=self.private, exist_ok=True)
                self.exists = True
            self.api.create_commit(self.repo, operations=operations, commit_message=message)
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._failed(error) from error

    def _list(self) -> dict[str, RepoFile]:
        try:
            tree = self.api.list_repo_tree(self.repo, recursive=True)
            return {item.path: item for item in tree if isinstance(item, RepoFile)}
        except RepositoryNotFoundError:
            self.exists = False
            return {}
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ConversionError:
        return ConversionError(
            f"{self.repo}: the hub refused or did not answer",
            [f"{type(error).__name__}: {error}"],
            "Log in with `hf auth login` if you have not. Finished shards are kept: run the same command again.",
        )
