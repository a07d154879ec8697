"""Folders that are repositories on the hub: downloaded to the hub's cache, or named with the command that does it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from grok1.errors import ConversionError
from grok1.files import free_bytes


REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What loading reads. Code is not fetched: the package has its own.
LOADED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "SHA256SUMS"]
RELEASE = "xai-org/grok-1"


def is_repository(name: str | Path) -> bool:
    """Whether a name is USER/NAME of the hub: two parts, and nothing of that name or of its first part is here."""
    path = Path(name)
    return bool(REPOSITORY.fullmatch(str(name))) and not path.exists() and not path.parent.exists()


def download_command(name: str | Path) -> str:
    """The command that downloads a repository to a folder."""
    return f"hf download {Path(name).as_posix()} --local-dir {Path(name).name}"


def local_folder(name: str | Path, *, whole: bool = False) -> Path:
    """The folder of that name; a repository USER/NAME is downloaded to the hub's cache, with the hub's progress bars.

    What is in the cache already is not downloaded again.

    Args:
        name: a folder, or USER/NAME.
        whole: also fetch the files that loading does not read, such as the code.

    Raises:
        ConversionError: there is neither a folder nor a repository, the repository holds no Grok-1, the disk has too
            little space, or the hub cannot be reached.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if not is_repository(path):
        found = "a file" if path.exists() else "nothing"
        raise ConversionError(f"{path}: expected a folder or USER/NAME of a repository on the hub, found {found}.")
    repository = path.as_posix()
    check_is_grok1(repository)
    return _download(repository, None if whole else LOADED)


def read_config(repository: str) -> Path:
    """config.json of a repository in the hub's cache. Raises ConversionError as `local_folder`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, "config.json"))
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if absent and repository == RELEASE:
            raise ConversionError(
                f"{repository}: these are xAI's own files, which have to be converted.",
                next_step=f"grok1 convert hf://{repository} OUT",
            ) from None
        if absent:
            raise ConversionError(f"{repository}: expected config.json in the repository, found none.") from None
        raise _failed(repository, error) from error


def check_is_grok1(repository: str) -> None:
    """Raises ConversionError unless the repository's config.json is that of a Grok-1. Nothing else is fetched."""
    path = read_config(repository)
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        model_type = None
    if model_type != "grok-1":
        raise ConversionError(f"{repository}: expected model_type 'grok-1' in its config.json, found {model_type!r}.")


def _download(repository: str, patterns: list[str] | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        if not constants.HF_HUB_OFFLINE:
            files = snapshot_download(repository, allow_patterns=patterns, dry_run=True)
            needed = sum(file.file_size or 0 for file in files if file.will_download)
            _announce(repository, needed, Path(constants.HF_HUB_CACHE))
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except ConversionError:
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "files that were downloaded stay in the hub's cache: run the same command again"
        ) from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _failed(repository, error) from error


def _announce(repository: str, needed: int, cache: Path) -> None:
    """Say what will be downloaded, on stderr; refuse what the disk cannot hold."""
    if not needed:
        return
    if needed > (free := free_bytes(cache)):
        raise ConversionError(
            f"{repository}: {needed:,} bytes to download, and {free:,} free in {cache}.",
            next_step="Free some space, or set HF_HOME to a folder on a larger disk.",
        )
    print(f"Downloading {repository}: {needed / 1e9:,.1f} GB to {cache}", file=sys.stderr)


def _failed(repository: str, error: BaseException) -> ConversionError:
    reason = str(error).strip().splitlines()
    return ConversionError(
        f"{repository}: no such folder here, and it cannot be downloaded from the hub.",
        [reason[0] if reason else type(error).__name__],
        "Check the name; for a private repository log in with `hf auth login`. To download it yourself: "
        + download_command(repository),
    )
