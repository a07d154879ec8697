"""A repository on the Hugging Face hub as the sink of a conversion.

Each shard is uploaded and committed when it is finished; config, code, index and card follow in one last commit. A
repository without an index is not a model for any loader, so an unfinished upload is never taken for a model.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
from huggingface_hub.errors import HfHubHTTPError

from grok1.conversion.from_hub import checksum_problem
from grok1.conversion.journal import OWN_NAMES
from grok1.conversion.ports import FolderSink
from grok1.conversion.shards import Shard
from grok1.errors import ConversionError
from grok1.files import INDEX_NAME, PARTIAL_SUFFIX, sha256_of, write_file


PUSHED_NAME = f".pushed{PARTIAL_SUFFIX}"  # inside the output folder: SHA-256 of what was uploaded


class HubSink(FolderSink):
    """`ports.Sink` that uploads.

    Args:
        repo: owner/name; made if it does not exist.
        private: whether a new repository is private.
        discard: delete a shard here when the hub has it.

    Raises:
        ConversionError: the repository cannot be made or read, or already holds a complete model.
    """

    def __init__(self, repo: str, private: bool = False, discard: bool = False):
        self.repo, self.discard, self.api = repo, discard, HfApi()
        self.keeps_shards = not discard
        try:
            self.api.create_repo(repo, private=private, exist_ok=True)
            tree = self.api.list_repo_tree(repo, recursive=True)
            self.remote = {item.path: item for item in tree if isinstance(item, RepoFile)}
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._failed(error) from error
        if INDEX_NAME in self.remote:
            raise ConversionError(
                f"{repo}: expected an empty repository or an unfinished upload, found a whole model ({INDEX_NAME})",
                next_step="Push to another repository, or delete the files of this one first.",
            )

    def has(self, shard: Shard, out: Path) -> bool:
        """Whether an earlier run finished the shard: the hub has the bytes that were written, or they are here."""
        return self._uploaded(shard.name, out) or super().has(shard, out)

    def _uploaded(self, name: str, out: Path) -> bool:
        remote, record = self.remote.get(name), self._record(out).get(name)
        return remote is not None and remote.lfs is not None and remote.lfs.sha256 == record

    def shard_finished(self, path: Path) -> None:
        record = self._record(path.parent)
        record[path.name] = sha256_of(path)
        if not self._uploaded(path.name, path.parent):
            self._commit([path], f"Add {path.name}")
        # After the commit: what is recorded is on the hub.
        write_file(path.parent / PUSHED_NAME, json.dumps(record, indent=1, sort_keys=True) + "\n")
        self.remote = {item.path: item for item in self._list()}
        if self.discard:
            problem = checksum_problem(path, self.remote[path.name])
            if problem:
                raise ConversionError(f"{self.repo}: not what was uploaded", [problem])
            path.unlink()

    def folder_finished(self, out: Path) -> None:
        for path in sorted(out.glob("model-*.safetensors")):
            if not self._uploaded(path.name, out):  # an earlier run was cut off between writing and uploading it
                self.shard_finished(path)
        skip = {*OWN_NAMES, PUSHED_NAME, *self._record(out)}
        files = [path for path in sorted(out.iterdir()) if path.is_file() and path.name not in skip]
        self._commit(files, "Add config, code, tokenizer, index and card")
        (out / PUSHED_NAME).unlink(missing_ok=True)

    def _commit(self, paths: list[Path], message: str) -> None:
        operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        try:
            self.api.create_commit(self.repo, operations=operations, commit_message=message)
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._failed(error) from error

    def _list(self) -> list[RepoFile]:
        try:
            tree = self.api.list_repo_tree(self.repo, recursive=True)
            return [item for item in tree if isinstance(item, RepoFile)]
        except (HfHubHTTPError, httpx2.HTTPError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ConversionError:
        return ConversionError(
            f"{self.repo}: the hub refused or did not answer",
            [f"{type(error).__name__}: {error}"],
            "Log in with `hf auth login` if you have not. Finished shards are kept: run the same command again.",
        )

    @staticmethod
    def _record(out: Path) -> dict[str, str]:
        path = out / PUSHED_NAME
        return json.loads(path.read_text()) if path.is_file() else {}
