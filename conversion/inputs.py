"""The checkpoint that a conversion begins with: its tensor files, config.json and tokenizer.model."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grok1.conversion.names import checkpoint_entries
from grok1.conversion.ports import FolderSource, Source
from grok1.conversion.settings import Settings
from grok1.conversion.tokenizer import TOKENIZER_NAME, check_supported, read_sentencepiece
from grok1.conversion.xai.checkpoint import examine_folder, list_files, read_tensor_file, resolve_folder
from grok1.errors import ConversionError
from grok1.files import INDEX_NAME, SINGLE_NAME, read_json
from modeling_grok1.configuration_grok1 import GrokConfig


TOKENIZER_HELP = (
    "Fetch it from https://github.com/xai-org/grok-1/raw/main/tokenizer.model and put it beside the checkpoint, or "
    "name it with --tokenizer; --no-tokenizer converts without one."
)
FETCH_AGAIN = "Fetch damaged or missing files again. If many shapes are wrong, the config is: see --config."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were examined.

    Args:
        name: as the user gave it.
        config: of the model.
        tokenizer: tokenizer.model, or None to convert without.
        source: its files.
        file_problems: what is wrong with the tensor files, one line per problem.
        problems: what else is wrong.
        next_step: what to do about `file_problems`.
    """

    name: str
    config: GrokConfig
    tokenizer: Path | None
    source: Source
    file_problems: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    next_step: str = FETCH_AGAIN


def find_folder(src: str | os.PathLike[str], out: Path, settings: Settings) -> Checkpoint:
    """The checkpoint in a local folder.

    Args:
        src: the folder with the tensor files, or the one above its ckpt-0/ or ckpt/.
        out: where it will be converted to.

    Raises:
        CheckpointError, ConversionError: there is no checkpoint or no config. Other problems are in the result.
    """
    src = Path(src)
    refuse_grok2_folder(src)
    refuse_converted_folder(src)
    try:
        folder = resolve_folder(src)
        config = find_config(src, folder, settings.config)
    except ConversionError as error:
        raise type(error)(error.summary, error.problems + settings.problems(), error.next_step) from None
    tokenizer: Path | None = None
    problems: list[str] = []
    if not settings.no_tokenizer:
        tokenizer, problems = find_tokenizer(beside(src, folder, TOKENIZER_NAME), settings, config.vocab_size)
    files, file_problems = examine_folder(folder, checkpoint_entries(config))
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        problems.append(f"{out}: expected a folder outside the checkpoint, found one in {folder}")
    return Checkpoint(str(src), config, tokenizer, FolderSource(files), file_problems, problems)


def find_config(src: Path, folder: Path, given: str | os.PathLike[str] | None = None) -> GrokConfig:
    """The config of a checkpoint: `given`, else config.json in `src` or its parent, else the release's if it fits.

    Args:
        src: as the user gave it.
        folder: the folder with the tensor files.

    Raises:
        ConversionError: the file is not a Grok-1's config, or there is none and the checkpoint is not the release.
    """
    candidates = [Path(given)] if given else beside(src, folder, "config.json")
    for path in candidates:
        if given or path.is_file():
            return read_config(path)
    release = GrokConfig()
    embedding = folder / "tensor00000_000"
    expected = (release.vocab_size, release.hidden_size)
    found = f"no {embedding.name}"
    if embedding.exists():
        found = f"{read_tensor_file(embedding).weight.shape}"
        if found == str(expected):
            return release
    raise ConversionError(
        f"{src}: no config.json, and not the released checkpoint",
        [
            f"config.json: expected one of {', '.join(map(str, candidates))}, found none",
            f"embedding: expected {expected} as in the release, found {found} among {len(list_files(folder))} files",
        ],
        "Name the config of this checkpoint with --config FILE.",
    )


def beside(src: Path, folder: Path, name: str) -> list[Path]:
    """Where a file that accompanies the checkpoint is looked for, in order."""
    return list(dict.fromkeys(place / name for place in (src, folder, src.absolute().parent)))


def read_config(path: Path) -> GrokConfig:
    """The config in a file. Raises ConversionError if it is not that of a Grok-1."""
    try:
        values = read_json(path)
        refuse_grok2(path, values)
        model_type = values.get("model_type", GrokConfig.model_type)
        if model_type != GrokConfig.model_type:
            raise ValueError(f"model_type: expected {GrokConfig.model_type!r}, found {model_type!r}")
        for key in ("model_type", "transformers_version", "quantization_config", "_name_or_path"):
            values.pop(key, None)
        return GrokConfig(**values)
    except ConversionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ConversionError(f"{path}: not the config of a Grok-1", [f"{path.name}: {error}"]) from None


def refuse_grok2(path: Path, values: dict[str, Any]) -> None:
    """Raises ConversionError if a config is that of Grok-2, whose fields look like those of Grok-1."""
    signs = [
        f"{key}: {values[key]!r}"
        for key, value in {"model_type": "git", "residual_moe": True}.items()
        if values.get(key) == value
    ]
    if signs:
        raise ConversionError(
            f"{path}: this is Grok-2, and these tools are for Grok-1",
            signs,
            "Grok-2 runs in SGLang, as https://huggingface.co/xai-org/grok-2 says: python3 -m sglang.launch_server "
            "--model FOLDER --tokenizer-path FOLDER/tokenizer.tok.json --tp 8 --quantization fp8 "
            "--attention-backend triton",
        )


def refuse_converted_folder(folder: Path) -> None:
    """Raises ConversionError if a folder holds the weights of a converted Grok-1 and no files of xAI."""
    weights = [name for name in (INDEX_NAME, SINGLE_NAME) if (folder / name).is_file()]
    if weights and not any(folder.glob("tensor*_000")) and not any(folder.glob("ckpt*/tensor*_000")):
        raise ConversionError(
            f"{folder}: expected xAI's files (tensor00000_000, ...), found a folder that is converted already",
            [f"it has {weights[0]}"],
            f'Use it as it is: grok1 generate {folder} "The answer to life". For another precision or layout convert '
            "xAI's files again; `grok1 export-xai FOLDER OUT` writes them from a converted folder.",
        )


def refuse_grok2_folder(folder: Path) -> None:
    """Raises ConversionError if the config.json in a folder is that of Grok-2. Other problems are not reported."""
    path = folder / "config.json"
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return
    refuse_grok2(path, values)


def find_tokenizer(candidates: list[Path], settings: Settings, vocab_size: int) -> tuple[Path | None, list[str]]:
    """tokenizer.model: the one in the settings, else the first candidate that exists; and what is wrong with it."""
    if settings.tokenizer is not None:
        candidates = [Path(settings.tokenizer)]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        where = ", ".join(map(str, candidates))
        return None, [f"{TOKENIZER_NAME}: expected {where}, found none. {TOKENIZER_HELP}"]
    try:
        problems = check_supported(read_sentencepiece(path), vocab_size)
    except ConversionError as error:
        problems = error.problems or [error.summary]
    return path, [f"{path}: {problem}" for problem in problems]
